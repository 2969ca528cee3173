"""C: what load balancing and segments are worth, with 8 to 64 workers (the ablation bars of the paper's revision).

    python -m experiments.sweep experiments/studies/ablations.py --out experiments/results/ablations.csv

The problem of `workers.py`. As in the paper an ablation takes the learning rate of the whole algorithm, here tuned for
each number of workers. "paper" draws a permutation for each of 16 segments at each step, by Algorithm 2 from a pool of
16; the other ablations change that or the recommended form, "crossover".
"""

from experiments.studies.study import Arm, Study
from experiments.studies.workers import get_config

WORKERS = (8, 16, 32, 64)
SEGMENTS = 16
PAPER = {  # of `config.crossover_paper`
    "paper": {"segments": SEGMENTS},
    "no load balancing": {"segments": SEGMENTS, "load_balanced": False},
    "no segments": {"segments": 1},
    "neither": {"segments": 1, "load_balanced": False},
}


def get_study() -> Study:
    arms = {}
    for n in WORKERS:
        whole = f"crossover {n}"

        def ablation(algorithm: str, whole=whole, n=n, **keys: object) -> Arm:
            own = {f"{algorithm}.{key}": value for key, value in keys.items()}
            return Arm(whole, {"algorithm": algorithm, "num_workers": n, **own}, rate_of=whole)

        arms[whole] = ablation("crossover")._replace(rate_of=None)
        for name, keys in PAPER.items():
            arms[f"{name} {n}"] = ablation("crossover_paper", pool_size=16, **keys)
        derangements = {"pool": "derangements", "segments": SEGMENTS, "pool_size": 16}
        arms[f"derangements {n}"] = ablation("crossover", **derangements)
        for segments in (1, 4, 64):
            name = f"{segments} segment{'s' * (segments > 1)} {n}"
            arms[name] = ablation("crossover", segments=segments, pool_size=min(16, n - 1))
        arms[f"phases {n}"] = ablation("crossover_phases")
        arms[f"one phase {n}"] = ablation("sgp")
    return Study(get_config(), arms, learning_rates=(0.1, 0.2, 0.4))
