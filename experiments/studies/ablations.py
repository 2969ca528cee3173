"""C: what load balancing and segments are worth, with 8 to 64 workers (the ablation bars of the paper's revision).

    python experiments/sweep.py experiments/studies/ablations.py --out experiments/results/ablations.csv

The problem of `workers.py`. As in the paper an ablation takes the learning rate of the whole algorithm, here tuned for
each number of workers. "paper" draws a permutation for each of 16 segments at each step, by Algorithm 2 from a pool of
16; the other ablations change that or the recommended form, "crossover".
"""

from experiments.studies.workers import get_config
from experiments.sweep import Arm, Study

WORKERS = (8, 16, 32, 64)
SEGMENTS = 16
PAPER = {
    "paper": "crossover_paper",
    "no load balancing": "crossover_no_balance",
    "no segments": "crossover_no_segments",
    "neither": "crossover_neither",
}


def get_study() -> Study:
    arms = {}
    for n in WORKERS:
        whole = f"crossover {n}"
        pool_size = min(16, n - 1)

        def ablated(whole=whole, n=n, **settings: object) -> Arm:
            own = {"algorithm.name": "crossover", "num_workers": n}
            return Arm(whole, own | {f"algorithm.{key}": value for key, value in settings.items()}, rate_of=whole)

        arms[whole] = ablated()._replace(rate_of=None)
        for name, algorithm in PAPER.items():
            arms[f"{name} {n}"] = ablated(name=algorithm, segments=SEGMENTS, pool_size=16)
        arms[f"derangements {n}"] = ablated(pool="derangements", segments=SEGMENTS, pool_size=16)
        for segments in (1, 4, 64):
            arms[f"{segments} segment{'s' * (segments > 1)} {n}"] = ablated(segments=segments, pool_size=pool_size)
        arms[f"phases {n}"] = ablated(name="crossover_phases")
        arms[f"one phase {n}"] = ablated(name="sgp")
    return Study(get_config(), arms, learning_rates=(0.1, 0.2, 0.4))
