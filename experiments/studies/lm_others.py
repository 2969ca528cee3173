"""A8, continued: what else could close the gap, one setting each, beside the arms of `lm_frontier.py`.

    python -m experiments.sweep experiments/studies/lm_others.py --out experiments/results/lm_others.csv

Everything as in `lm_frontier.py`, eight workers, but three seeds. The budget, in models per step, stands behind each.
NoLoCo sends two models per period, φ and φ − θ. LARS and Muon stand inside three rounds in int8 at every step: the arm
to compare them with is "three rounds in int8", with AdamW inside. LARS has a learning rate of its own. "Moments on
clocks" is DES-LOC's Adam, by gossip: x at every step, Adam's first moment at every third and its second at every sixth,
in float32, for its moments do not bear int8 (`LOG.md`); the arm to compare it with is "crossover".
"""

from experiments.studies.lm_frontier import CORRECTED, CROSSOVER, INT4
from experiments.studies.lm_frontier import get_study as frontier
from experiments.studies.study import Arm, Study

ADAMW: dict[str, object] = {"adamw.b2": 0.95, "adamw.weight_decay": 5e-4}  # not chosen: as in `default.py`
MUON = {**ADAMW, "optimizer": "muon", "muon.b2": 0.99, "muon.weight_decay": 0.1}
# A trust ratio of 1 times the learning rate, so that steps are about as long as AdamW's at one rate.
LARS = {**ADAMW, "optimizer": "lars", "lars.average_norms": True, "lars.coefficient": 1.0}
ARMS: dict[str, dict[str, object]] = {
    "NoLoCo 16": {**CROSSOVER, "algorithm": "noloco", "noloco.every": 16},  # 2 / 16
    "three rounds in int4 corrected": {**INT4, **CORRECTED, "crossover.rounds": 3},  # 0.39, and 0.09 for the reference
    "LARS of averaged norms": LARS,  # 0.76
    "Muon": MUON,  # 0.76
    "moments on clocks": {**CROSSOVER, "algorithm": "des_loc"},  # 1 + 1/3 + 1/6
}


def get_study() -> Study:
    arms = {
        name: Arm("lars" if overrides is LARS else "lm", {"num_workers": 8, **overrides})
        for name, overrides in ARMS.items()
    }
    return frontier()._replace(arms=arms, seeds=3)
