"""A: accuracy by global mini-batch with 8 workers (the paper's figures 6 and 7).

    python -m experiments.sweep experiments/studies/batch.py --out experiments/results/batch.csv

The perceptron of `workers.py`, 10 epochs whatever the batch, learning rates tuned for each batch and algorithm.
"""

from experiments.studies.study import Arm, Study
from experiments.studies.workers import allreduce, get_config

BATCHES = (512, 2048, 8192, 16_384)
WORKERS = 8


def get_study() -> Study:
    arms = {}
    for batch in BATCHES:
        problem, shared = f"batch {batch}", {"batch_size": batch, "num_workers": WORKERS}
        arms[f"allreduce {batch}"] = allreduce(problem, batch_size=batch)
        for name in ("sgp", "crossover"):
            arms[f"{name} {batch}"] = Arm(problem, {"algorithm": name, **shared})
    return Study(get_config(), arms, learning_rates=(0.1, 0.2, 0.4))
