"""Train all cells of a study, tuned alike, into one CSV; what is there already is not run again.

    python -m experiments.sweep experiments/studies/workers.py --out experiments/results/workers.csv

On Linux GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before it halves the time of 64 workers: their buffers come fresh from
the system at every step, and in small pages that takes as long as the arithmetic.

How arms are tuned and compared: `studies/study.py`. Workers are simulated; a run is `train.py`'s, batch for batch. Runs
that differ only in seed and learning rate share a compiled program, which trains `--lanes` of them at once. Where a
study goes on from another one, that one's runs are trained again, for nothing of a run is kept but its rows.
"""

import argparse
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:  # as a script
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import crossover_jax as cj
from experiments import csv_rows, data, processes
from experiments.evaluate import make_evaluate
from experiments.paths import local_path
from experiments.program import make_program, steps_of, train_batches, wire_bytes_per_step
from experiments.settings import check_settings
from experiments.step import Diverged, TrainState, init_state
from experiments.studies.study import (
    BEFORE,
    FINAL,
    KEY,
    Run,
    Study,
    final_rate,
    groups_of,
    is_first,
    load_study,
    missing_runs,
    run_config,
    run_of,
    select_arms,
)

PyTree = Any
Row = dict[str, Any]
Model = tuple[PyTree, PyTree]  # parameters and model state
COLUMNS = (
    *KEY,
    *("step", "epoch", "train_loss", "accuracy", "loss", "bits_per_byte", "workers_accuracy", "workers_accuracy_min"),
    *("consensus_distance", "wire_bytes_per_step", "seconds", "code"),
)


def main(argv: Sequence[str]) -> int:
    """Run what is missing; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=pathlib.Path, help="a Python file with get_study()")
    parser.add_argument("--out", required=True, help="CSV")
    parser.add_argument("--data_dir", help="where the data set lies, instead of where the study's config says")
    parser.add_argument("--lanes", type=int, default=1, help="runs that one call trains")
    parser.add_argument("--seeds", type=int, help="of final runs, instead of the study's own number")
    parser.add_argument("--arms", type=lambda text: text.split(","), help="only these")
    args = parser.parse_args(argv)
    try:
        out = local_path("--out", args.out)
        study = load_study(args.study)
        study.config.dataset.data_dir = args.data_dir or study.config.dataset.data_dir
        arms = select_arms(study.arms, args.arms) if args.arms else study.arms
        study = study._replace(seeds=args.seeds or study.seeds, arms=arms)
        rows = run_missing(study, out, args.lanes)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, data.DataMissing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{summary(study, rows)}")
    return 0


def run_missing(study: Study, out: pathlib.Path, lanes: int) -> list[Row]:
    """All rows of the study, those in `out` and those of the runs that were missing there."""
    rows, trained, began = csv_rows.read(out), 0, time.perf_counter()
    while runs := missing_runs(study, rows):
        for group in groups_of(study, runs):
            trainer = Trainer(study, group[0])
            for i in range(0, len(group), lanes):
                some = group[i : i + lanes]
                own, _ = train(study, trainer, some)
                csv_rows.append(out, own, COLUMNS)
                rows += own
                last = {run_of(row): row for row in own}
                trained += len(some)
                left = len(missing_runs(study, rows))
                hours = left * (time.perf_counter() - began) / trained / 3600
                lines = "\n".join(map(line_of, last.values()))
                print(f"{lines}   {left} left of this stage, {hours:.1f} h", flush=True)
    return rows


# Training


class Trainer:
    """The compiled programs of the runs that differ in seed and learning rate only."""

    def __init__(self, study: Study, run: Run):
        self.config = config = run_config(study, run)
        check_settings(config)
        self.train_set, self.eval_set = (
            data.load(config.dataset.name, split, data_dir=config.dataset.data_dir, sequence=config.dataset.sequence)
            for split in (config.dataset.train_split, config.dataset.eval_split)
        )
        self.num_steps = steps_of(config, self.train_set)
        workers = config.num_workers

        def program(seed: jax.Array | None = None, learning_rate: jax.Array | None = None):
            return make_program(config, self.train_set, workers, self.num_steps, seed=seed, learning_rate=learning_rate)

        def step(state, batch, now, seed, learning_rate):
            state, metrics = program(seed, learning_rate).step(state, batch, now)
            return state, (metrics["loss"] + metrics["update"]).mean()  # NaN where an update was left out

        self.program = program()
        self.init = jax.jit(over_runs(lambda seed: cj.copies(program(seed).init, workers)))
        self.step = jax.jit(over_runs(step, in_axes=(0, 0, None, 0, 0)), donate_argnums=0)
        self.wire_bytes = wire_bytes_per_step(self.program.algorithm, self.program.shapes.params, config)
        self._of_mean, self._of_all = (
            make_evaluate(self.program.predict, self.program.algorithm, workers, each=each) for each in (False, True)
        )

    def batches(self, seed: int) -> Iterator[PyTree]:
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        return train_batches(config, self.train_set, self.program.batch_part)

    def begin_with(self, models: Sequence[Model]) -> PyTree:
        """The state before the first step of runs whose workers begin with these models."""
        algorithm, workers = self.program.algorithm, self.config.num_workers
        states = [cj.copies(init_state(*model, algorithm), workers) for model in models]
        return jax.tree.map(lambda *x: jnp.stack(x), *states)

    def evaluate(self, step: int, state: PyTree, *, each: bool) -> Row:
        batches = data.eval_batches(self.eval_set, batch_size=self.config.eval_batch_size)
        return (self._of_all if each else self._of_mean)(step, state, batches)


def over_runs(function: Callable, in_axes: Any = 0) -> Callable:
    """`vmap`, but for a single run, which XLA compiles better without the axis."""

    def run(*args: PyTree) -> PyTree:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        if len(jax.tree.leaves(args[axes.index(0)])[0]) > 1:
            return jax.vmap(function, in_axes)(*args)
        pairs = zip(args, axes, strict=True)
        own = [arg if axis is None else jax.tree.map(lambda x: x[0], arg) for arg, axis in pairs]
        return jax.tree.map(lambda x: jnp.asarray(x)[None], function(*own))

    return run


def train(study: Study, trainer: Trainer, runs: Sequence[Run]) -> tuple[list[Row], list[Model]]:
    """Train these runs together, from the first step to the last; their rows, and the averaged model of each."""
    seeds, rates = np.array([run.seed for run in runs]), np.array([run.learning_rate for run in runs], np.float32)
    first, models = ([], None) if study.before is None else train_before(study.before, runs)
    began = time.perf_counter()
    state = trainer.init(seeds) if models is None else trainer.begin_with(models)
    batches = zip(*(trainer.batches(run.seed) for run in runs), strict=True)
    marks = {round(trainer.num_steps * (i + 1) / study.curve) for i in range(study.curve)} | {trainer.num_steps}
    rows: list[Row] = []
    losses: list[jax.Array] = []
    for step in range(1, trainer.num_steps + 1):
        batch = jax.tree.map(lambda *lanes: np.stack(lanes), *next(batches))
        state, loss = trainer.step(state, batch, np.int32(step - 1), seeds, rates)
        jax.block_until_ready(losses[-1:])  # one step late, as in train.py
        losses.append(loss)
        if step not in marks:
            continue
        means, losses = np.mean(jax.device_get(losses), axis=0), []
        for i, run in enumerate(runs):
            if step == trainer.num_steps or is_first(run):
                own = jax.tree.map(lambda x, i=i: x[i], state)
                row = {"step": step, "epoch": round(step * trainer.config.batch_size / len(trainer.train_set), 2)}
                row |= run_row(trainer, run, step, own, float(means[i]))
                rows.append({**run._asdict(), **row, "code": processes.code_version()})
    seconds = round((time.perf_counter() - began) / len(runs), 1)
    rows = sorted(({**row, "seconds": seconds} for row in rows), key=lambda row: runs.index(run_of(row)))
    return first + rows, [averaged(trainer, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(len(runs))]


def train_before(study: Study, runs: Sequence[Run]) -> tuple[list[Row], list[Model]]:
    """The same of the runs of the study before from which `runs` go on; their rows are of stage "before"."""
    rows: list[Row] = []
    models = {}
    for group in groups_of(study, [Run(run.arm, FINAL, final_rate(study, [], run.arm), run.seed) for run in runs]):
        own, found = train(study, Trainer(study, group[0]), group)
        rows += [{**row, "stage": BEFORE} for row in own]
        models |= dict(zip(((run.arm, run.seed) for run in group), found, strict=True))
    return rows, [models[run.arm, run.seed] for run in runs]


def averaged(trainer: Trainer, state: TrainState) -> Model:
    """The average of the workers' models."""
    algorithm = trainer.program.algorithm
    return cj.mean_over_workers((algorithm.model(state.params, state.algorithm), state.model_state))


def run_row(trainer: Trainer, run: Run, step: int, state: PyTree, loss: float) -> Row:
    """A run's numbers after `step`; none where it has diverged. Of a final run the test set is read at the end."""
    is_end = step == trainer.num_steps
    row: Row = {"train_loss": round(loss, 5), "wire_bytes_per_step": round(trainer.wire_bytes)}
    if run.stage == FINAL and not is_end:
        distance = cj.consensus_distance(trainer.program.algorithm.model(state.params, state.algorithm))
        return {**row, "consensus_distance": f"{float(distance):.3g}"}
    if not np.isfinite(loss):
        return row
    try:
        found = trainer.evaluate(step, state, each=is_end and run.stage == FINAL)
    except Diverged:
        return row
    row |= {
        "accuracy": round(100 * found["eval/mean/accuracy"], 3),
        "loss": round(found["eval/mean/loss"], 5),
        "consensus_distance": f"{found['consensus_distance']:.3g}",
    }
    if trainer.config.dataset.name == "text":
        row["bits_per_byte"] = round(found["eval/mean/loss"] / math.log(2), 5)
    for name in ("workers_accuracy", "workers_accuracy_min"):
        if (value := found.get(f"eval/{name.replace('_', '/', 1)}")) is not None:
            row[name] = round(100 * value, 3)
    return row


# What is shown and kept


def line_of(row: Row) -> str:
    what = f"{row['arm']:28} {row['stage']:6} lr {row['learning_rate']:<7g} seed {row['seed']:<5}"
    shown = f"bits per byte {row['bits_per_byte']}" if "bits_per_byte" in row else f"accuracy {row.get('accuracy')}"
    return f"{what} {shown}  {row['seconds']} s"


def summary(study: Study, rows: Sequence[Row]) -> str:
    """A line per arm: its learning rate, and the mean of its final accuracies, of text of its bits per byte."""
    lines = []
    for name in study.arms:
        final = {row["seed"]: row for row in rows if (row["arm"], row["stage"]) == (name, FINAL)}
        of_text = study.config.dataset.name == "text"
        found = [row.get("bits_per_byte" if of_text else "accuracy") or np.nan for row in final.values()]
        rate, deviation = next(iter(final.values()))["learning_rate"], np.std(found, ddof=1) if len(found) > 1 else 0.0
        digits = 4 if of_text else 2
        lines.append(
            f"{name:28} lr {rate:<7g} {np.mean(found):.{digits}f} ± {deviation:.{digits}f} of {len(found)} seeds"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
