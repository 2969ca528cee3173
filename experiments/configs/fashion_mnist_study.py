"""One run of an arm of a study by `train.py`, with all its rows and curves, at the learning rate that the study chose.

    python -m experiments.train --config=experiments/configs/fashion_mnist_study.py:gap/crossover --workdir=runs/gap

Behind the colon stand study and arm, in quotes where there are blanks. What belongs to which of the paper's claims, a
minute or less each on two cores:

1. large batches (figures 6 and 7): `batch/allreduce 16384`, `batch/crossover 16384`
2. many workers (figure 8): `workers/crossover 8`, `workers/crossover 64`
3. against SGP (figure 8, ablations): `workers/sgp 1 peer 64`, `ablations/no segments 64`
4. hierarchies (figure 8): `workers/crossover 8`, which is any number of workers in 8 groups
5. the gap closed (ours): `gap/three rounds in int8`

The paper's numbers and ours stand in `docs/results.md`.
"""

import importlib
import pathlib

import ml_collections

from experiments import csv_rows
from experiments.studies.study import FINAL, RESULTS, Run, final_rate, run_config, select_arms

EXPERIMENTS = pathlib.Path(__file__).parents[1]


def get_config(which: str = "gap/three rounds in int8") -> ml_collections.ConfigDict:
    """Raises `ValueError` for a study or an arm that there is not, that has not been tuned, or that goes on."""
    name, _, arm = which.partition("/")
    names = sorted(path.stem for path in (EXPERIMENTS / "studies").glob("[a-z]*.py") if path.stem != "study")
    if name not in names:
        raise ValueError(f"`study/arm` must begin with one of {', '.join(names)}, got {which!r}.")
    study = importlib.import_module(f"experiments.studies.{name}").get_study()
    if study.before is not None:
        raise ValueError(f"`study/arm` must be of a study whose runs begin anew, got {which!r}: only sweep goes on.")
    select_arms(study.arms, [arm])
    rate = final_rate(study, csv_rows.read(RESULTS / f"{name}.csv"), arm)
    config = run_config(study, Run(arm, FINAL, rate, seed=0))
    config.schedule.learning_rate = rate
    return config
