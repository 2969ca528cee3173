"""Take one model out of a run's checkpoint, for whoever has flax and orbax and nothing of ours.

    python -m experiments.export runs/fashion_mnist models/fashion_mnist
    python -m experiments.export runs/fashion_mnist models/worker_3 --step=best --workers=3

    OUT/model         orbax: nested dicts "params" and "model_state" of numpy arrays
    OUT/README.md     the model card: what it is, how good it is, and the lines that load it
    OUT/config.json   the config of the run, by dotted names

The averaged model is one that no worker ran, so BatchNorm gets new statistics unless --batch_norm=average.
"""

import argparse
import itertools
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

if not __package__:  # as a script
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import crossover_jax as cj
from crossover_jax import islands
from crossover_jax.islands.observe import OBSERVER
from experiments import card, checkpoint, data, models, processes, report
from experiments.checkpoint import Damaged
from experiments.evaluate import make_evaluate
from experiments.paths import local_path
from experiments.program import Program, make_program
from experiments.settings import config_of
from experiments.step import Diverged, TrainState
from experiments.workdir import METRICS, Row, read_rows

PyTree = Any
BATCH = 256  # examples in a forward pass: what was spread over many devices may be exported on one
BATCH_NORM = ("recalibrate", "average")


class Restored(NamedTuple):
    """A checkpoint with all that its config makes, its workers simulated on one device whatever trained them."""

    record: dict[str, Any]
    config: ml_collections.ConfigDict
    train_set: data.Dataset
    eval_set: data.Dataset
    program: Program
    state: TrainState


class Figures(NamedTuple):
    """How good the exported model is, and the workers that it comes from."""

    step: int
    accuracy: float
    loss: float
    workers: Row  # under the keys of metrics.jsonl
    source: str  # of them


def export(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    step: str = "last",
    workers: str = "mean",
    batch_norm: str = "recalibrate",
    examples: int = 8192,
    data_dir: str | None = None,
    roster: str | None = None,
    keys: str | None = None,
    plain_text: bool = False,
) -> Figures:
    """Write to the folder `out`, new or empty, a model of the run in `workdir`: all of it, or nothing.

    `step` is a number, "best" or "last", which goes back to the newest whole checkpoint; `workers` is "mean" or the
    number of one. With the `roster` of islands that train now `workdir` is that of one of them, and the model the mean
    of all; then `keys` is the folder of their keys, or `plain_text` says that there are none. Raises `ValueError` for
    what cannot be had, `Damaged`, `data.DataMissing` and `islands.LinkError`.
    """
    workdir, out = local_path("WORKDIR", workdir), local_path("OUT", out).resolve()
    if batch_norm not in BATCH_NORM:
        raise ValueError(f"`--batch_norm` must be one of {', '.join(BATCH_NORM)}, got {batch_norm!r}.")
    if examples < 1:
        raise ValueError(f"`--examples` must be at least 1, got {examples}.")
    if workers != "mean" and not workers.isdecimal():
        raise ValueError(f"`--workers` must be 'mean' or the number of a worker, got {workers!r}.")
    if (roster is not None) != bool(keys) + plain_text:
        raise ValueError(
            "`--roster` must come with one of `--keys` and `--plain_text`, and they with it: what travels between "
            "islands is encrypted, or said not to be."
        )
    check_vacant(out)
    restored = restore(workdir, step, data_dir)
    num_workers = restored.record["num_workers"]
    if workers != "mean" and int(workers) >= num_workers:
        raise ValueError(f"`--workers` must be 'mean' or from 0 to {num_workers - 1}, got {workers}.")

    model_of = restored.program.algorithm.model
    of_workers = cj.per_worker(lambda s: (model_of(s.params, s.algorithm), s.model_state), num_workers, donate=False)
    own = of_workers(restored.state)
    if roster is not None:
        tls = islands.Tls.of(keys, OBSERVER) if keys else None
        own = islands.gather_mean(islands.roster_of(roster), like=own[0], tls=tls), own[1]
    params, model_state = cj.mean_over_workers(own) if workers == "mean" else cj.one_worker(own, int(workers))
    model_state, statistics = _statistics(restored, params, model_state, workers, batch_norm, examples)
    figures = evaluate(workdir, restored, own[0], params, model_state)
    tree = plain({"params": params, "model_state": model_state})
    what = "islands" if roster is not None else workers
    write(out, tree, _card(restored, what, figures, statistics, tree), card.config_text(restored.record))
    return figures


def _statistics(
    restored: Restored, params: PyTree, model_state: PyTree, workers: str, batch_norm: str, examples: int
) -> tuple[PyTree, str]:
    """The exported model's BatchNorm statistics, and a sentence about where they come from."""
    if not jax.tree.leaves(model_state):
        return model_state, "The model has no BatchNorm."
    if batch_norm == "average":
        averaged = ", averaged over the workers" if workers == "mean" else ""
        return model_state, f"BatchNorm has the running statistics of training{averaged}."
    model_state, (number, size) = recalibrated(restored, params, model_state, examples)
    return model_state, (
        "BatchNorm has statistics that were made for this model: the mean and the biased variance of each layer's "
        f"input over {number * size} examples of `{restored.train_set.split}` without augmentation, in {number} "
        f"batches of {size} which the layers below normalise each by its own."
    )


def _card(restored: Restored, workers: str, figures: Figures, statistics: str, tree: PyTree) -> str:
    record, row = restored.record, figures.workers
    of = f"{record['num_workers']} workers"
    what = f"The average of the models of {of}" if workers == "mean" else f"Worker {workers}, one of {of},"
    return card.fill(
        record,
        restored.eval_set,
        what="The average of the models of all islands" if workers == "islands" else what,
        epochs=record["examples"] / len(restored.train_set),
        accuracy=figures.accuracy,
        loss=figures.loss,
        of_workers=row["eval/workers/accuracy"],
        least=row["eval/workers/accuracy_min"],
        most=row["eval/workers/accuracy_max"],
        distance=row["consensus_distance"],
        source=figures.source,
        statistics=statistics,
        leaves=card.leaf_table(tree),
    )


def restore(workdir: pathlib.Path, step: str, data_dir: str | None = None) -> Restored:
    """The checkpoint of `step`, verified. Raises `Damaged`, but for "last" only if there is no whole one."""
    found = checkpoint.steps(workdir)
    if not found:
        raise ValueError(
            f"`WORKDIR` must hold the checkpoints of a run, got {workdir} without any: name a run's folder."
        )
    none_whole = f"`WORKDIR` must hold a whole checkpoint, got {workdir} where all {len(found)} are damaged."
    if step == "last":
        restored, _ = checkpoint.newest_whole(
            workdir,
            lambda candidate: restore_step(workdir, candidate, data_dir),
            lambda _, error: processes.say(f"WARNING: {error}"),
        )
        if restored is None:
            raise Damaged(none_whole)
        return restored
    if step == "best":
        record, _ = checkpoint.newest_whole(
            workdir, lambda candidate: checkpoint.read_record(workdir, candidate), lambda *_: None
        )
        if record is None:
            raise Damaged(none_whole)
        if record["best"] is None:
            raise ValueError(
                f"`--step` must not be 'best' where {workdir} has no evaluation up to step {record['step']}: name one."
            )
        step = str(record["best"][0])
    if step not in map(str, found):
        raise ValueError(
            f"`--step` must be 'last', 'best' or a checkpoint of {workdir}, {', '.join(map(str, found))}, got {step}."
        )
    return restore_step(workdir, int(step), data_dir)


def restore_step(workdir: pathlib.Path, step: int, data_dir: str | None) -> Restored:
    """One checkpoint. Raises `Damaged`, and `ValueError` if the data are not those of the run."""
    try:
        record = checkpoint.read_record(workdir, step)
        config = config_from(record)
        c, workers = config.dataset, record["num_workers"]
        load = partial(data.load, c.name, data_dir=data_dir or c.data_dir, sequence=c.sequence)
        train_set, eval_set = load(c.train_split), load(c.eval_split)
        digests = ", ".join(dataset.digest for dataset in (train_set, eval_set))
        if digests != record["config"]["data"]:
            raise ValueError(
                f"`--data_dir` must hold the data of the run, {record['config']['data']}, got {digests} in "
                f"{data_dir or c.data_dir}: name the folder that it was trained from."
            )
        program = make_program(config, train_set, workers, 1)
        state = checkpoint.restore(workdir, record, cj.abstract_copies(program.shapes, workers))
        checkpoint.verify(record, state)
    except Damaged as error:
        raise Damaged(f"the checkpoint of step {step} in {workdir} is damaged: {error}; name another --step.") from None
    return Restored(record, config, train_set, eval_set, program, state)


def config_from(record: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config of the run, where BatchNorm does not divide a batch: to evaluate a model it need not.

    >>> config = config_from({"config": {"seed": 3, "model.options.bn_groups": 8, "data": "mnist"}})
    >>> config.seed, config.model.options.bn_groups
    (3, 1)
    """
    config = config_of(card.recorded_config(record))
    if "bn_groups" in config.model.options:
        config.model.options.bn_groups = 1
    return config.lock()


def recalibrated(
    restored: Restored, params: PyTree, model_state: PyTree, examples: int
) -> tuple[PyTree, tuple[int, int]]:
    """Statistics of `params` over so many examples of the training set, in (number, size) of equal batches."""
    examples = min(examples, len(restored.train_set))
    number = -(-examples // BATCH)
    size = examples // number
    batches = data.train_batches(
        restored.train_set, batch_size=size, num_workers=1, seed=restored.config.seed, augment=False
    )

    def forward(model_state: PyTree, image: jax.Array) -> PyTree:
        return restored.program.apply(params, model_state, image, train=True)[1]

    images = (batch["image"][0] for batch in itertools.islice(batches, number))
    return models.recalibrate(forward, model_state, images), (number, size)


def evaluate(workdir: pathlib.Path, restored: Restored, own: PyTree, params: PyTree, model_state: PyTree) -> Figures:
    """The exported model, evaluated; its workers as the run did, or anew where it did not at this step."""
    record, program = restored.record, restored.program
    step, size = record["step"], min(BATCH, restored.config.eval_batch_size)
    batches = partial(data.eval_batches, restored.eval_set, batch_size=size)
    as_it_is = program.algorithm._replace(model=lambda params, state: params)
    alone = jax.tree.map(lambda x: x[None], TrainState(params, model_state, ()))
    row = make_evaluate(program.predict, as_it_is, 1)(step, alone, batches())
    rows = read_rows(workdir, step) if (workdir / METRICS).is_file() else []
    if rows and rows[-1]["step"] == step and "eval/workers/accuracy" in rows[-1]:
        workers, source = rows[-1], f"from the run's `{METRICS}`"
    else:
        workers = make_evaluate(program.predict, program.algorithm, record["num_workers"])(
            step, restored.state, batches()
        )
        source = "computed from the checkpoint"
    workers = workers | {"consensus_distance": float(jax.device_get(cj.consensus_distance(own)))}
    return Figures(step, row["eval/mean/accuracy"], row["eval/mean/loss"], workers, source)


def plain(tree: PyTree) -> PyTree:
    """Dicts with strings as keys and numpy arrays, which orbax restores on any device."""
    if isinstance(tree, dict):
        return {str(name): plain(below) for name, below in tree.items()}
    return np.asarray(jax.device_get(tree))


def check_vacant(out: pathlib.Path) -> None:
    """Raise `ValueError` if there is something at `out`, but for an empty folder, or if it cannot be made."""
    try:
        if out.exists() and any(out.iterdir()):
            raise ValueError(
                f"`OUT` must be a new or an empty folder, got {out}, which is not empty: name another one."
            )
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`OUT` must be a folder that can be written, got {out}: {error.strerror}.") from None


def write(out: pathlib.Path, tree: PyTree, readme: str, config: str) -> None:
    """All files under another name first, so that `out` is whole or not there. Raises `ValueError`."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.mkdir()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(unfinished / "model", tree)
        (unfinished / "README.md").write_text(readme)
        (unfinished / "config.json").write_text(config)
        unfinished.rename(out)  # an empty folder makes way
    except OSError as error:
        raise ValueError(f"`OUT` must be a folder that can be written, got {out}: {error.strerror}.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---- the command line ----


class Parser(argparse.ArgumentParser):
    """A mistake is one line, as in train.py."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}; --help tells more.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", metavar="WORKDIR", help="the folder of a run, as train.py's --workdir")
    parser.add_argument("out", metavar="OUT", help="a new or an empty folder")
    parser.add_argument("--step", default="last", metavar="N|best|last", help="which checkpoint; default: last")
    parser.add_argument("--workers", default="mean", metavar="mean|I", help="the averaged model, or worker I's")
    parser.add_argument("--batch_norm", default="recalibrate", choices=BATCH_NORM, help="which statistics")
    parser.add_argument("--examples", type=int, default=8192, help="of the training set, to recalibrate; default: 8192")
    parser.add_argument("--data_dir", help="where the data lie; default: where they did")
    parser.add_argument("--roster", help="of islands that train now: the mean of all, WORKDIR being that of one")
    parser.add_argument("--keys", metavar="DIR", help="with --roster: of `islands keys`")
    parser.add_argument("--plain_text", action="store_true", help="with --roster: the run is without TLS")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """A user's mistake is one sentence, anything else a traceback."""
    args = parse(argv)
    logging.set_verbosity(logging.WARNING)  # TFDS reports each file that it reads
    try:
        figures = export(**vars(args))
    except (ValueError, data.DataMissing, Damaged, Diverged, islands.LinkError) as error:
        sys.exit(f"error: {error}")
    row = figures.workers
    lines = {
        "exported": f"step {figures.step} to {args.out}",
        "accuracy": f"{figures.accuracy:.4f}",
        "loss": f"{figures.loss:.4f}",
        "accuracy, workers": f"{row['eval/workers/accuracy']:.4f}, from {row['eval/workers/accuracy_min']:.4f} to "
        f"{row['eval/workers/accuracy_max']:.4f}",
        "consensus distance": f"{row['consensus_distance']:.4f}",
    }
    processes.say(report.table(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
