"""D: LARS with trust ratios from each worker's own norms, or from norms averaged over workers.

    python -m experiments.sweep experiments/studies/lars.py --out experiments/results/lars.csv

The problem of `workers.py`, with the paper's optimizer: coefficient 0.0025, momentum 0.9, weight decay that follows the
learning rate. Of AllReduce there is one kind, all its workers have the norms of the averaged gradient.
"""

from experiments.studies.study import Arm, Study
from experiments.studies.workers import BATCH, allreduce, get_config

WORKERS = (8, 64)


def get_study() -> Study:
    config, problem = get_config(), f"batch {BATCH}"
    config.optimizer = "lars"
    arms = {"allreduce": allreduce(problem)}
    for n in WORKERS:
        for name, averaged in (("own norms", False), ("averaged norms", True)):
            own = {"algorithm": "crossover", "num_workers": n, "lars.average_norms": averaged}
            arms[f"{name} {n}"] = Arm(problem, own)
    return Study(config, arms, learning_rates=(2.0, 4.0, 8.0))
