"""E: `large.py` with the paper's optimizer: does gossip beat AllReduce by LARS, if both have their best warm-up?

    python experiments/sweep.py experiments/studies/large_lars.py --out experiments/results/large_lars.csv

The problem of `lars.py`, 2048 examples in a batch, 8 workers, trust ratios from each worker's own norms, and learning
rates in steps of √2, for LARS is on the edge of what it can take.
"""

from experiments.studies import lars
from experiments.studies.large import WARMUPS
from experiments.studies.workers import BATCH, allreduce
from experiments.sweep import Arm, Study

WORKERS = 8


def get_study() -> Study:
    config, problem, arms = lars.get_study().config, f"batch {BATCH}", {}
    for warmup in WARMUPS:
        own = {"optimizer.warmup": warmup}
        label = "" if warmup == WARMUPS[0] else f" with warm-up {warmup:g}"
        arms[f"allreduce{label}"] = allreduce(problem, **own)
        arms[f"crossover{label}"] = Arm(problem, {"algorithm.name": "crossover", "num_workers": WORKERS, **own})
    return Study(config, arms, learning_rates=(2.0, 2.8, 4.0, 5.7, 8.0, 11.3), seeds=20)
