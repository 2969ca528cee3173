"""B: how accuracy falls with the number of gossiping workers, at a fixed global batch (the paper's figure 8).

    python experiments/sweep.py experiments/studies/workers.py --out experiments/results/workers.csv

A perceptron 784-128-10 on Fashion-MNIST, 10 epochs of batch 2048, momentum 0.9, tuned learning rates. AllReduce is
the same computation for every number of workers, and so is a hierarchy of g gossiping groups, whatever their size: it
is gossip between g workers, with gradients averaged inside.
"""

import ml_collections

from experiments.configs import fashion_mnist
from experiments.sweep import Arm, Study

WORKERS = (4, 8, 16, 32, 64)


def get_config() -> ml_collections.ConfigDict:
    """What all studies have in common."""
    config = fashion_mnist.get_config()
    config.model.name, config.model.options = "mlp", ml_collections.ConfigDict({"hidden": (128,)})
    config.batch_size, config.eval_batch_size = 2048, 5000
    return config


def get_study() -> Study:
    # AllReduce is simulated by as few workers as there may be: the result is the same to rounding.
    arms = {"allreduce": Arm("batch 2048", {"algorithm.name": "allreduce", "num_workers": 4})}
    for n in WORKERS:
        gossip = {"crossover": {}, "sgp": {}, "sgp, 2 peers": {"algorithm.peers": 2}}
        for name, settings in gossip.items():
            own = {"algorithm.name": name.split(",")[0], "num_workers": n, **settings}
            arms[f"{name} {n}"] = Arm("batch 2048", own)
    return Study(get_config(), arms, learning_rates=(0.1, 0.2, 0.4))
