"""Train all cells of a study, tuned alike, into one CSV; what is there already is not run again.

    python experiments/sweep.py experiments/studies/workers.py --out experiments/results/workers.csv

On Linux GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before it halves the time of 64 workers: their buffers come fresh from
the system at every step, and in small pages that takes as long as the arithmetic.

A study compares arms: settings of one config by name. First each arm is tuned: the same learning rates, the same few
seeds, trained on a part of the training set and judged by the averaged model's accuracy on the rest. Where the best of
an arm is at an end of the grid, all arms of its problem get another learning rate beyond it. Then each arm is trained
with its best on the whole training set, over the study's seeds, and the test set is read once, at the end.

Workers are simulated; a run is `train.py`'s, batch for batch. Runs that differ in seed and learning rate only share one
compiled program, and `--lanes` of them are trained by each of its calls.
"""

import argparse
import csv
import importlib.util
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # as a script, not only as a module

import crossover_jax as cj
from experiments import data, processes
from experiments.evaluate import make_evaluate
from experiments.program import (
    check_settings,
    flat_settings,
    make_program,
    steps_of,
    train_batches,
    wire_bytes_per_step,
)
from experiments.step import Diverged

PyTree = Any
Row = dict[str, Any]
TUNING, FINAL = "tuning", "final"
HELD_OUT = 10_000  # examples at the end of the training set, on which arms are tuned
FIRST_TUNING_SEED = 1000  # no final run has one of these
WIDER = 3  # learning rates beyond each end of the grid before an arm is given up
KEY = ("arm", "stage", "learning_rate", "seed")
MEASURED = (
    *("step", "epoch", "train_loss", "accuracy", "loss", "workers_accuracy", "workers_accuracy_min"),
    *("consensus_distance", "wire_bytes_per_step", "seconds", "code"),
)


class Arm(NamedTuple):
    """One of the things that are compared."""

    problem: str  # what it is compared on: arms of one problem are tuned on the same learning rates
    settings: Mapping[str, Any]  # of the config, by dotted keys
    rate_of: str | None = None  # the arm whose learning rate it takes instead of being tuned


class Study(NamedTuple):
    """What `get_study()` in a study's file returns."""

    config: ml_collections.ConfigDict  # what all arms have in common
    arms: Mapping[str, Arm]
    learning_rates: Sequence[float]  # ascending, at least two
    tuning_seeds: int = 3
    seeds: int = 10  # of final runs
    curve: int = 5  # rows of a run; of others than the first of each arm and rate only the last is kept


class Run(NamedTuple):
    """A cell of the grid, named as in the CSV."""

    arm: str
    stage: str
    learning_rate: float
    seed: int


def main(argv: Sequence[str]) -> int:
    """Run what is missing; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=pathlib.Path, help="a Python file with get_study()")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="CSV")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--lanes", type=int, default=1, help="runs that one call trains")
    parser.add_argument("--seeds", type=int, help="of final runs, instead of the study's own number")
    parser.add_argument("--arms", type=lambda text: text.split(","), help="only these")
    args = parser.parse_args(argv)
    try:
        study = load_study(args.study)
        study.config.dataset.data_dir = args.data_dir
        study = study._replace(
            seeds=args.seeds or study.seeds, arms=chosen(study.arms, args.arms) if args.arms else study.arms
        )
        rows = run_missing(study, args.out, args.lanes)
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
    rows, trained, began = read(out), 0, time.perf_counter()
    while runs := missing(study, rows):
        for group in grouped(study, runs):
            trainer = Trainer(study, group[0])
            for i in range(0, len(group), lanes):
                own = train(study, trainer, group[i : i + lanes])
                append(out, own)
                rows += own
                last = {run_of(row): row for row in own}
                trained += len(last)
                left = len(missing(study, rows))
                hours = left * (time.perf_counter() - began) / trained / 3600
                lines = "\n".join(map(line_of, last.values()))
                print(f"{lines}   {left} left of this stage, {hours:.1f} h", flush=True)
    return rows


def load_study(path: pathlib.Path) -> Study:
    """`get_study()` of a Python file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_study()


def chosen(arms: Mapping[str, Arm], names: Sequence[str]) -> Mapping[str, Arm]:
    """These arms, and those whose learning rates they take. Raises `ValueError` for an unknown one."""
    if unknown := [name for name in names if name not in arms]:
        raise ValueError(f"the arm must be among {', '.join(arms)}, got {unknown[0]!r}.")
    lenders = [arms[name].rate_of for name in names]
    return {name: arm for name, arm in arms.items() if name in names or name in lenders}


# Which runs


def missing(study: Study, rows: Sequence[Row]) -> list[Run]:
    """The runs of the next stage that have no row: tuning until no grid has to be widened, then the final ones."""
    done = {tuple(row[name] for name in KEY) for row in rows}
    grids = {problem: grid_of(study, rows, problem) for problem in {arm.problem for arm in study.arms.values()}}
    tuning = [
        Run(name, TUNING, rate, FIRST_TUNING_SEED + i)
        for name, arm in study.arms.items()
        if arm.rate_of is None
        for rate in grids[arm.problem]
        for i in range(study.tuning_seeds)
    ]
    if left := [run for run in tuning if run not in done]:
        return left
    final = (
        Run(name, FINAL, best_rate(rows, arm.rate_of or name), seed)
        for name, arm in study.arms.items()
        for seed in range(study.seeds)
    )
    return [run for run in final if run not in done]


def grid_of(study: Study, rows: Sequence[Row], problem: str) -> list[float]:
    """The learning rates of a problem, so far: wider than the study's where an arm was best at an end."""
    grid = list(study.learning_rates)
    names = [name for name, arm in study.arms.items() if arm.problem == problem and arm.rate_of is None]
    means = {name: tuned(rows, name) for name in names}
    for _ in range(2 * WIDER):
        whole = [means[name] for name in names if all(rate in means[name] for rate in grid)]
        best = [max(grid, key=of_rate.__getitem__) for of_rate in whole]
        if grid[-1] in best and grid[-1] < 2**WIDER * study.learning_rates[-1]:
            grid.append(2 * grid[-1])
        elif grid[0] in best and grid[0] > study.learning_rates[0] / 2**WIDER:
            grid.insert(0, grid[0] / 2)
    return grid


def tuned(rows: Sequence[Row], arm: str) -> dict[float, float]:
    """Mean accuracy over the tuning seeds by learning rate; a run that diverged counts as none right."""
    found: dict[float, dict[int, float]] = {}
    for row in rows:  # the last row of a run stays
        if (row["arm"], row["stage"]) == (arm, TUNING):
            found.setdefault(row["learning_rate"], {})[row["seed"]] = row.get("accuracy") or 0.0
    return {rate: float(np.mean(list(of_seeds.values()))) for rate, of_seeds in found.items()}


def best_rate(rows: Sequence[Row], arm: str) -> float:
    means = tuned(rows, arm)
    return max(means, key=means.__getitem__)


def grouped(study: Study, runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs that one compiled program can train, one group after the other."""

    def program_of(run: Run) -> str:
        return run.stage + str(sorted(flat_settings(config_of(study, run)).items(), key=str))

    for _, group in itertools.groupby(sorted(runs, key=program_of), key=program_of):
        yield list(group)


def config_of(study: Study, run: Run) -> ml_collections.ConfigDict:
    """What a run trains with, but for its seed and learning rate. Raises `KeyError` for an unknown key."""
    config = study.config.copy_and_resolve_references()
    config.simulate = "yes"
    config.update_from_flattened_dict(dict(study.arms[run.arm].settings))
    if run.stage == TUNING:
        config.dataset.train_split, config.dataset.eval_split = f"train[:-{HELD_OUT}]", f"train[-{HELD_OUT}:]"
    return config


# Training


class Trainer:
    """The compiled programs of the runs that differ in seed and learning rate only."""

    def __init__(self, study: Study, run: Run):
        self.config = config = config_of(study, run)
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
            return state, metrics["loss"].mean()

        self.program = program()
        self.init = jax.jit(over_runs(lambda seed: cj.copies(program(seed).init, workers)))
        self.step = jax.jit(over_runs(step, in_axes=(0, 0, None, 0, 0)), donate_argnums=0)
        self.wire_bytes = wire_bytes_per_step(self.program.algorithm, self.program.shapes.params, config)
        self._of_mean, self._of_all = (
            make_evaluate(self.program.predict, self.program.algorithm, workers, workers=every)
            for every in (False, True)
        )

    def batches(self, seed: int) -> Iterator[PyTree]:
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        return train_batches(config, self.train_set, self.program.batch_part)

    def evaluate(self, step: int, state: PyTree, *, workers: bool) -> Row:
        batches = data.eval_batches(self.eval_set, batch_size=self.config.eval_batch_size)
        return (self._of_all if workers else self._of_mean)(step, state, batches)


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


def train(study: Study, trainer: Trainer, runs: Sequence[Run]) -> list[Row]:
    """Train these runs together, from the first step to the last; their rows."""
    began = time.perf_counter()
    seeds, rates = np.array([run.seed for run in runs]), np.array([run.learning_rate for run in runs], np.float32)
    state = trainer.init(seeds)
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
                row |= measured(trainer, run, step, own, float(means[i]))
                rows.append({**run._asdict(), **row, "code": processes.code_version()})
    seconds = round((time.perf_counter() - began) / len(runs), 1)
    return sorted(({**row, "seconds": seconds} for row in rows), key=lambda row: runs.index(run_of(row)))


def is_first(run: Run) -> bool:
    return run.seed in (0, FIRST_TUNING_SEED)


def run_of(row: Row) -> Run:
    return Run(*(row[name] for name in KEY))


def measured(trainer: Trainer, run: Run, step: int, state: PyTree, loss: float) -> Row:
    """A run's numbers after `step`; none where it has diverged. Of a final run the test set is read at the end."""
    is_end = step == trainer.num_steps
    row: Row = {"train_loss": round(loss, 5), "wire_bytes_per_step": round(trainer.wire_bytes)}
    if run.stage == FINAL and not is_end:
        distance = cj.consensus_distance(trainer.program.algorithm.model(state.params, state.algorithm))
        return {**row, "consensus_distance": f"{float(distance):.3g}"}
    try:
        found = trainer.evaluate(step, state, workers=is_end and run.stage == FINAL)
    except Diverged:
        return row
    row |= {
        "accuracy": round(100 * found["eval/mean/accuracy"], 3),
        "loss": round(found["eval/mean/loss"], 5),
        "consensus_distance": f"{found['consensus_distance']:.3g}",
    }
    for name in ("workers_accuracy", "workers_accuracy_min"):
        if (value := found.get(f"eval/{name.replace('_', '/', 1)}")) is not None:
            row[name] = round(100 * value, 3)
    return row


# What is shown and kept


def read(path: pathlib.Path) -> list[Row]:
    """The rows of earlier calls, numbers as numbers."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def append(path: pathlib.Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, (*KEY, *MEASURED))
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def line_of(row: Row) -> str:
    what = f"{row['arm']:28} {row['stage']:6} lr {row['learning_rate']:<7g} seed {row['seed']:<5}"
    return f"{what} accuracy {row.get('accuracy', 'none')}  {row['seconds']} s"


def summary(study: Study, rows: Sequence[Row]) -> str:
    """A line per arm: its learning rate, and the mean of its final accuracies."""
    lines = []
    for name in study.arms:
        final = {row["seed"]: row for row in rows if (row["arm"], row["stage"]) == (name, FINAL)}
        found = [row.get("accuracy") or 0.0 for row in final.values()]
        rate = next(iter(final.values()))["learning_rate"]
        lines.append(
            f"{name:28} lr {rate:<7g} {np.mean(found):.2f} ± {np.std(found, ddof=1):.2f} of {len(found)} seeds"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
