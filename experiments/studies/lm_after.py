"""D: what is left of it: models of `lm_frontier.py` are trained on by plain AdamW, all alike, on another text.

    python -m experiments.data.prepare gcide --data_dir data
    python -m experiments.sweep experiments/studies/lm_after.py --out experiments/results/lm_after.csv

Four arms of `lm_frontier.py` are trained again, at the learning rates that they have in its results. One worker then
goes on from the averaged model: 800 steps of 4096 bytes of an English dictionary, AdamW from its first step on, one
learning rate for all, three seeds. A row of stage "before" tells what a model was on the first text.
"""

from experiments.configs import lm
from experiments.studies.lm_frontier import CROSSOVER
from experiments.studies.lm_frontier import get_study as frontier
from experiments.studies.study import Arm, Study

ARMS = ("allreduce", "three rounds in int8 corrected", "DiLoCo 16", "gossip outer 16")
LEARNING_RATE = 0.008


def get_study() -> Study:
    before = frontier()
    before = before._replace(arms={name: before.arms[name] for name in ARMS}, rates_of="lm_frontier", curve=1)
    config = lm.get_config()
    config.dataset.data_dir, config.dataset.eval_split = "data/gcide.txt", before.config.dataset.eval_split
    config.checkpoint.every = None
    alone = Arm("after", {"algorithm": "alone", "num_workers": 1, **CROSSOVER})
    return Study(config, dict.fromkeys(ARMS, alone), learning_rates=(LEARNING_RATE,), seeds=3, before=before)
