"""B: how accuracy falls with the number of gossiping workers, at a fixed global batch (the paper's figure 8).

    python -m experiments.sweep experiments/studies/workers.py --out experiments/results/workers.csv

A perceptron 784-128-10 on Fashion-MNIST, 10 epochs of batch 2048 (293 steps), momentum 0.9, tuned learning rates.
AllReduce is the same computation for every number of workers. So is a hierarchy of g groups, whatever their size: it is
gossip between g workers that average the gradients of their members, "crossover 4" here for 4 groups of 2, 4, 8 or 16.
"""

import ml_collections

from experiments.configs import fashion_mnist
from experiments.studies.study import Arm, Study

WORKERS = (4, 8, 16, 32, 64)
BATCH = 2048


def get_config() -> ml_collections.ConfigDict:
    """What all studies have in common."""
    config = fashion_mnist.get_config()
    config.model.name, config.model.options = "mlp", ml_collections.ConfigDict({"hidden": (128,)})
    config.batch_size, config.eval_batch_size = BATCH, 5000
    return config


def allreduce(problem: str, **overrides: object) -> Arm:
    """By as few workers as it takes: their number changes the rounding only, and the simulation's time."""
    return Arm(problem, {"algorithm": "allreduce", "num_workers": 4, **overrides})


def get_study() -> Study:
    problem = f"batch {BATCH}"
    arms = {"allreduce": allreduce(problem)}
    for n in WORKERS:
        arms[f"crossover {n}"] = Arm(problem, {"algorithm": "crossover", "num_workers": n})
    for n in WORKERS[1:]:
        for peers in (1, 2):
            overrides = {"algorithm": "sgp", "sgp.peers": peers, "num_workers": n}
            arms[f"sgp {peers} peer{'s' * (peers - 1)} {n}"] = Arm(problem, overrides)
    return Study(get_config(), arms, learning_rates=(0.1, 0.2, 0.4))
