"""A32: the same with 32 workers of two examples each, where one worker's gradient is almost all noise.

    python -m experiments.sweep experiments/studies/lm_workers.py --out experiments/results/lm_workers.csv

What is common to all arms, and how they are tuned: `lm_frontier.py`. AllReduce is the same computation for every number
of workers. 800 steps. The oracle has the second moment of the average gradient by an all-reduce, in the rounds of the
arm of the same name.
"""

from experiments.studies.lm_frontier import CORRECTED, CROSSOVER, INT4, outer
from experiments.studies.lm_frontier import get_study as frontier
from experiments.studies.study import Arm, Study

WORKERS = 32
ORACLE = {name.replace("gossip_adamw", "oracle_adamw"): value for name, value in CORRECTED.items()}
ORACLE["optimizer"] = "oracle_adamw"
ARMS: dict[str, dict[str, object]] = {
    "three rounds in int8": {},
    "three rounds in int8 corrected": CORRECTED,
    "three rounds in int8 oracle": ORACLE,
    "six rounds in int4 corrected": {**INT4, **CORRECTED},
    "gossip outer 16 three rounds in int8": outer(16, rounds=3, wire="int8"),
}


def get_study() -> Study:
    study = frontier()
    study.config.steps = 800
    arms = {"allreduce": Arm("lm", {"algorithm": "allreduce", "num_workers": 4, **CROSSOVER})}
    arms |= {name: Arm("lm", {"num_workers": WORKERS, **overrides}) for name, overrides in ARMS.items()}
    return study._replace(arms=arms)
