"""E: what closes the gap between flat gossip of 64 workers and AllReduce, in the bytes of one float32 model per step.

    python -m experiments.sweep experiments/studies/gap.py --out experiments/results/gap.csv

The problem of `workers.py`. Every gossiping arm sends at most one float32 model per worker and step. With 256 workers,
8 examples each, an arm takes the learning rate that it has with 64.
"""

from experiments.studies.study import Arm, Study
from experiments.studies.workers import BATCH, allreduce, get_config

WORKERS = 64
PHASES = "phases"
CANDIDATES = {  # of `config.crossover`
    "crossover": {},
    "momentum too in bfloat16": {"momentum_rounds": 1, "wire": "bfloat16"},
    "two rounds in bfloat16": {"rounds": 2, "wire": "bfloat16"},
    "one round in bfloat16": {"wire": "bfloat16"},  # half the bytes
    PHASES: {},
    "three rounds in int8": {"rounds": 3, "wire": "int8"},  # 0.76 of the bytes
    "rows": {"cut": "rows", "pool_size": 14},  # segments of rows of the large matrix, which 14 divides
    "three rounds in int8 to a reference": {"rounds": 3, "wire": "int8", "renew_every": 50},  # 0.80 of the bytes
    "two rounds and momentum in int8": {"rounds": 2, "momentum_rounds": 1, "wire": "int8"},  # 0.76 of the bytes
}


def get_study() -> Study:
    problem = f"batch {BATCH}"
    arms = {"allreduce": allreduce(problem)}
    # The same in another rounding: by how much two runs differ that should not.
    arms["allreduce by 8 workers"] = allreduce(problem, num_workers=8)._replace(rate_of="allreduce")
    for name, keys in CANDIDATES.items():
        own = {"algorithm": "crossover_phases" if name == PHASES else "crossover"}
        own |= {f"crossover.{key}": value for key, value in keys.items()}
        arms[name] = Arm(problem, {**own, "num_workers": WORKERS})
        arms[f"{name} 256"] = Arm(problem, {**own, "num_workers": 256}, rate_of=name)
    return Study(get_config(), arms, learning_rates=(0.1, 0.2, 0.4), seeds=20)
