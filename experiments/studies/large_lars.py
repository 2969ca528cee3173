"""E: `large.py` with the paper's optimizer: does gossip beat AllReduce by LARS, if both have their best warm-up?

    python -m experiments.sweep experiments/studies/large_lars.py --out experiments/results/large_lars.csv

The problem of `lars.py`, 2048 examples in a batch, 8 workers, trust ratios from each worker's own norms, and learning
rates in steps of √2, for LARS is on the edge of what it can take.
"""

from experiments.studies import lars
from experiments.studies.large import arms_of
from experiments.studies.study import Study
from experiments.studies.workers import BATCH


def get_study() -> Study:
    rates = (2.0, 2.8, 4.0, 5.7, 8.0, 11.3)
    return Study(lars.get_study().config, arms_of(f"batch {BATCH}"), learning_rates=rates, seeds=20)
