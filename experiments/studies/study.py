"""What a study compares, and which of its runs are missing.

A study compares arms: overrides of one config by name. First each arm is tuned: the same learning rates, the same few
seeds, trained on a part of the training set and judged by the averaged model on the rest: by its accuracy, of text by
its bits per byte. Where the best of an arm is at an end of the grid, all arms of its problem get another learning rate
beyond it. Then each arm is trained with its best on the whole training set, over the study's seeds, and the test set is
read once, at the end. Of text training is always on "train"; arms are tuned on "validation" and read on "test".

Nothing is tuned where the arms take the learning rates that another study found, or where there is a single one.
"""

import importlib.util
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from experiments import csv_rows
from experiments.settings import flat_settings

Row = dict[str, Any]
TUNING, FINAL = "tuning", "final"
BEFORE = "before"  # of the study before: the run that a final one goes on from
RESULTS = pathlib.Path(__file__).parents[1] / "results"
HELD_OUT = 10_000  # examples at the end of the training set, on which arms are tuned
FIRST_TUNING_SEED = 1000  # no final run has one of these
WIDER = 3  # learning rates beyond each end of the grid before an arm is given up
KEY = ("arm", "stage", "learning_rate", "seed")


class Arm(NamedTuple):
    """One of the things that are compared."""

    problem: str  # what it is compared on: arms of one problem are tuned on the same learning rates
    overrides: Mapping[str, Any]  # of the config, by dotted keys
    rate_of: str | None = None  # the arm whose learning rate it takes instead of being tuned


class Study(NamedTuple):
    """What `get_study()` in a study's file returns."""

    config: ml_collections.ConfigDict  # what all arms have in common
    arms: Mapping[str, Arm]
    learning_rates: Sequence[float]  # ascending; a single one is taken by all arms
    tuning_seeds: int = 3
    seeds: int = 10  # of final runs
    curve: int = 5  # rows of a run; of others than the first of each arm and rate only the last is kept
    rates_of: str | None = None  # the study in whose results arms of the same names have their learning rates
    before: "Study | None" = None  # a study: each run goes on from the averaged model of the same arm and seed there


class Run(NamedTuple):
    """A cell of the grid, named as in the CSV."""

    arm: str
    stage: str
    learning_rate: float
    seed: int


def load_study(path: pathlib.Path) -> Study:
    """`get_study()` of a Python file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_study()


def select_arms(arms: Mapping[str, Arm], names: Sequence[str]) -> Mapping[str, Arm]:
    """These arms, and those whose learning rates they take. Raises `ValueError` for an unknown one."""
    if unknown := [name for name in names if name not in arms]:
        raise ValueError(f"the arm must be among {', '.join(arms)}, got {unknown[0]!r}.")
    lenders = [arms[name].rate_of for name in names]
    return {name: arm for name, arm in arms.items() if name in names or name in lenders}


def missing_runs(study: Study, rows: Sequence[Row]) -> list[Run]:
    """The runs of the next stage that have no row: tuning until no grid has to be widened, then the final ones."""
    done = {tuple(row[name] for name in KEY) for row in rows}
    grids = {problem: grid_of(study, rows, problem) for problem in {arm.problem for arm in study.arms.values()}}
    tuning = [
        Run(name, TUNING, rate, FIRST_TUNING_SEED + i)
        for name, arm in study.arms.items()
        if arm.rate_of is None and study.rates_of is None and len(study.learning_rates) > 1
        for rate in grids[arm.problem]
        for i in range(study.tuning_seeds)
    ]
    if left := [run for run in tuning if run not in done]:
        return left
    final = (
        Run(name, FINAL, final_rate(study, rows, name), seed) for name in study.arms for seed in range(study.seeds)
    )
    return [run for run in final if run not in done]


def grid_of(study: Study, rows: Sequence[Row], problem: str) -> list[float]:
    """The learning rates of a problem, so far: wider than the study's where an arm was best at an end."""
    grid = list(study.learning_rates)
    names = [name for name, arm in study.arms.items() if arm.problem == problem and arm.rate_of is None]
    means = {name: tuning_scores(rows, name) for name in names}
    for _ in range(2 * WIDER):
        whole = [means[name] for name in names if all(rate in means[name] for rate in grid)]
        best = [max(grid, key=of_rate.__getitem__) for of_rate in whole]
        if grid[-1] in best and grid[-1] < 2**WIDER * study.learning_rates[-1]:
            grid.append(2 * grid[-1])
        elif grid[0] in best and grid[0] > study.learning_rates[0] / 2**WIDER:
            grid.insert(0, grid[0] / 2)
    return grid


def tuning_scores(rows: Sequence[Row], arm: str) -> dict[float, float]:
    """How good an arm is by learning rate, the more the better: accuracy, of text minus bits per byte.

    Means over the tuning seeds. A run that diverged counts as none right, of text as infinitely bad.
    """
    of_text = any(row.get("bits_per_byte") for row in rows)
    found: dict[float, dict[int, float]] = {}
    for row in rows:  # the last row of a run stays
        if (row["arm"], row["stage"]) == (arm, TUNING):
            found.setdefault(row["learning_rate"], {})[row["seed"]] = (
                -(row.get("bits_per_byte") or np.inf) if of_text else row.get("accuracy") or 0.0
            )
    return {rate: float(np.mean(list(of_seeds.values()))) for rate, of_seeds in found.items()}


def final_rate(study: Study, rows: Sequence[Row], arm: str) -> float:
    """The learning rate of an arm's final runs. Raises `ValueError` where it is not known yet."""
    if len(study.learning_rates) == 1:
        return study.learning_rates[0]
    if study.rates_of is not None:
        there = csv_rows.read(RESULTS / f"{study.rates_of}.csv")
        found = [row["learning_rate"] for row in there if (row["arm"], row["stage"]) == (arm, FINAL)]
        if not found:
            raise ValueError(f"{arm!r} must have final runs in {study.rates_of}.csv, whose learning rate it takes.")
        return found[0]
    lender = study.arms[arm].rate_of or arm
    means = tuning_scores(rows, lender)
    if not means:
        raise ValueError(f"{lender!r} must be tuned before a run of {arm!r} is trained to its end: it has no row.")
    return max(means, key=means.__getitem__)


def groups_of(study: Study, runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs that one compiled program can train, one group after the other."""

    def program_of(run: Run) -> str:
        return run.stage + str(sorted(flat_settings(run_config(study, run)).items(), key=str))

    for _, group in itertools.groupby(sorted(runs, key=program_of), key=program_of):
        yield list(group)


def run_config(study: Study, run: Run) -> ml_collections.ConfigDict:
    """What a run trains with, but for its seed and learning rate. Raises `KeyError` for an unknown key."""
    config = study.config.copy_and_resolve_references()
    config.simulate, config.period = "yes", 1
    config.update_from_flattened_dict(dict(study.arms[run.arm].overrides))
    if run.stage == TUNING and config.dataset.name == "text":  # `eval_split` is of "test"
        config.dataset.eval_split = config.dataset.eval_split.replace("test", "validation")
    elif run.stage == TUNING:
        config.dataset.train_split, config.dataset.eval_split = f"train[:-{HELD_OUT}]", f"train[-{HELD_OUT}:]"
    return config


def is_first(run: Run) -> bool:
    return run.seed in (0, FIRST_TUNING_SEED)


def run_of(row: Row) -> Run:
    return Run(*(row[name] for name in KEY))
