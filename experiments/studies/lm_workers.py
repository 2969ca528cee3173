"""A32: the same with 32 workers of two examples each, where one worker's gradient is almost all noise.

    python -m experiments.sweep experiments/studies/lm_workers.py --out experiments/results/lm_workers.csv

What is common to all arms, and how they are tuned: `lm_frontier.py`. AllReduce is the same computation for every number
of workers. 800 steps.
"""

from experiments.studies.lm_frontier import CORRECTED, CROSSOVER, INT4
from experiments.studies.lm_frontier import get_study as frontier
from experiments.studies.study import Arm, Study

WORKERS = 32
ARMS: dict[str, dict[str, object]] = {
    "three rounds in int8": {},
    "three rounds in int8 corrected": CORRECTED,
    "six rounds in int4 corrected": {**INT4, **CORRECTED},
}


def get_study() -> Study:
    study = frontier()
    study.config.steps = 800
    arms = {"allreduce": Arm("lm", {"algorithm": "allreduce", "num_workers": 4, **CROSSOVER})}
    arms |= {name: Arm("lm", {"num_workers": WORKERS, **overrides}) for name, overrides in ARMS.items()}
    return study._replace(arms=arms, seeds=3)
