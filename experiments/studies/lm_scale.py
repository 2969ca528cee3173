"""C: 8, 16, 32 and 64 workers at the same bytes per worker and step, and at the same global batch.

    python -m experiments.sweep experiments/studies/lm_scale.py --out experiments/results/lm_scale.csv

With 64 workers each has one example of 64 bytes in a step. An exchange at every step (0.86 to 0.87 of a model), and
outer steps (0.76 / 16). What is common to all arms: `lm_frontier.py`. 800 steps. Each arm is tuned with 8 workers, on
one seed, and takes the same learning rate with more; then three seeds. AllReduce is the same computation for every
number of workers.
"""

from experiments.studies.lm_frontier import CORRECTED, CROSSOVER, INT4, outer
from experiments.studies.lm_frontier import get_study as frontier
from experiments.studies.study import Arm, Study

WORKERS = (8, 16, 32, 64)
ARMS: dict[str, dict[str, object]] = {
    "six rounds in int4 corrected": {**INT4, **CORRECTED},
    "gossip outer 16 three rounds in int8": outer(16, rounds=3, wire="int8"),
}


def get_study() -> Study:
    study = frontier()
    study.config.steps = 800
    arms = {"allreduce": Arm("lm", {"algorithm": "allreduce", "num_workers": 4, **CROSSOVER})}
    for name, overrides in ARMS.items():
        for n in WORKERS:
            lender = None if n == WORKERS[0] else f"{name} {WORKERS[0]}"
            arms[f"{name} {n}"] = Arm("lm", {"num_workers": n, **overrides}, rate_of=lender)
    return study._replace(arms=arms, seeds=3)
