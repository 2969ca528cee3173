"""B: how many steps between two outer steps, and how much outer momentum, for eight workers that gossip.

    python -m experiments.sweep experiments/studies/lm_outer.py --out experiments/results/lm_outer.csv

Outer steps of SGD with Nesterov's momentum μ after each H steps, one exchange in float32 (1/H of a model per step). A
momentum makes outer steps longer by 1 / (1 − μ), so each is asked for twice: at η .7, and at the η that has the same
η / (1 − μ) as η .7 with μ .5. What is common to all arms: `lm_frontier.py`. 800 steps. Of each H the arm of μ .5 is
tuned, on one seed, and the others take its learning rate; then two seeds.
"""

from experiments.studies.lm_frontier import get_study as frontier
from experiments.studies.lm_frontier import outer
from experiments.studies.study import Arm, Study

STEPS = (4, 16, 64)
MOMENTA = (0.0, 0.5, 0.9)
RATE, MIDDLE = 0.7, 0.5


def name_of(every: int, momentum: float, rate: float) -> str:
    return f"H {every} momentum {momentum:g} rate {rate:g}"


def get_study() -> Study:
    study = frontier()
    study.config.steps = 800
    arms = {}
    for every in STEPS:
        middle = name_of(every, MIDDLE, RATE)
        pairs = [(m, RATE) for m in MOMENTA] + [(m, round(RATE / (1 - MIDDLE) * (1 - m), 2)) for m in MOMENTA]
        for momentum, rate in pairs:  # the middle comes twice
            name = name_of(every, momentum, rate)
            overrides = {"num_workers": 8, **outer(every, momentum=momentum, learning_rate=rate)}
            arms[name] = Arm(f"H {every}", overrides, rate_of=None if name == middle else middle)
    return study._replace(arms=arms, seeds=2)
