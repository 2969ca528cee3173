"""E: a million parameters: does the order of the arms stay, at the learning rates of the small model?

    python -m experiments.sweep experiments/studies/lm_million.py --out experiments/results/lm_million.csv

The decoder of `configs/lm_1m.py`, four arms of `lm_frontier.py` with eight workers, 800 steps, two seeds. Nothing is
tuned: each arm takes the learning rate that it has in the results of `lm_frontier.py`.
"""

from experiments.configs import lm_1m
from experiments.studies.lm_frontier import get_study as frontier
from experiments.studies.study import Study

ARMS = ("allreduce", "three rounds in int8 corrected", "DiLoCo 16", "gossip outer 16")


def get_study() -> Study:
    study = frontier()
    study.config.model, study.config.steps = lm_1m.get_config().model, 800
    return study._replace(arms={name: study.arms[name] for name in ARMS}, rates_of="lm_frontier", seeds=2)
