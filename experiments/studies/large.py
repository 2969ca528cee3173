"""E: does gossip beat AllReduce at a large mini-batch, if AllReduce's warm-up is tuned as well?

    python -m experiments.sweep experiments/studies/large.py --out experiments/results/large.csv

The perceptron of `workers.py` with 16,384 examples in a batch, 37 steps in 10 epochs, 8 workers. Learning rates are
tuned for each length of warm-up, a part of all steps; "allreduce" and "crossover" have that of the other studies.
"""

from experiments.studies.study import Arm, Study
from experiments.studies.workers import allreduce, get_config

BATCH, WORKERS = 16_384, 8
WARMUPS = (0.1, 0.0, 0.3, 0.5)


def arms_of(problem: str) -> dict[str, Arm]:
    """AllReduce and Crossover with every warm-up."""
    arms = {}
    for warmup in WARMUPS:
        own = {"schedule.warmup": warmup}
        label = "" if warmup == WARMUPS[0] else f" with warm-up {warmup:g}"
        arms[f"allreduce{label}"] = allreduce(problem, **own)
        arms[f"crossover{label}"] = Arm(problem, {"algorithm": "crossover", "num_workers": WORKERS, **own})
    return arms


def get_study() -> Study:
    config = get_config()
    config.batch_size = BATCH
    return Study(config, arms_of(f"batch {BATCH}"), learning_rates=(0.05, 0.1, 0.2))
