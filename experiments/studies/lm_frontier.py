"""A8: bits per byte against bytes sent per token, for eight workers: who should send what, how often.

    python -m experiments.sweep experiments/studies/lm_frontier.py --out experiments/results/lm_frontier.csv

The decoder of `configs/lm.py` on Python's standard library, 1600 steps of 4096 bytes. All arms have AdamW with b2 .99,
weight decay 0.1 and each worker's gradient clipped to norm 1 (of AllReduce the average's), and are tuned alike: three
learning rates on one seed, on held-out text; then five seeds on the test text. Outer steps of SGD with Nesterov's
momentum, η .7. "corrected" is `gossip_adamw`. The budget, in models per step, stands behind each arm.
"""

from experiments.configs import lm
from experiments.studies.study import Arm, Study

STEPS = 1600
CORRECTED: dict[str, object] = {
    "optimizer": "gossip_adamw",
    "gossip_adamw.b2": 0.99,
    "gossip_adamw.weight_decay": 0.1,
    "adamw.b2": 0.95,  # as in `default.py`: of what is not chosen no key may be changed
    "adamw.weight_decay": 5e-4,
}
INT4: dict[str, object] = {"crossover.rounds": 6, "crossover.wire": "int4", "crossover.renew_every": 20}
CROSSOVER: dict[str, object] = {"crossover.rounds": 1, "crossover.wire": None}
ARMS: dict[str, dict[str, object]] = {
    "allreduce": {"algorithm": "allreduce", **CROSSOVER},  # 1.75
    "three rounds in int8": {},  # 0.76
    "three rounds in int8 corrected": CORRECTED,
    "crossover": CROSSOVER,  # 1
    "crossover corrected": {**CROSSOVER, **CORRECTED},
    "six rounds in int4 corrected": {**INT4, **CORRECTED},  # 0.77, and 0.09 for the reference
}


def outer(every: int, **keys: object) -> dict[str, object]:
    return {"algorithm": "outer", **CROSSOVER, "outer.every": every, **{f"outer.{k}": v for k, v in keys.items()}}


for H in (16, 64):
    ARMS[f"DiLoCo {H}"] = outer(H, mix="average", momentum=0.9)  # 1.75 / H
    ARMS[f"gossip outer {H}"] = outer(H)  # 1 / H
    ARMS[f"gossip outer {H} three rounds in int8"] = outer(H, rounds=3, wire="int8")  # 0.76 / H
ARMS["gossip outer 8 three rounds in int8"] = outer(8, rounds=3, wire="int8")  # 0.76 / 8: less than DiLoCo 16 sends
ARMS["streamed 16"] = outer(16, stream=True)  # 1 / 16


def get_study() -> Study:
    config = lm.get_config()
    config.steps, config.checkpoint.every = STEPS, None
    config.dataset.eval_split = "+".join(f"test[{i}%:{i + 1}%]" for i in range(0, 100, 10))
    arms = {name: Arm("lm", {"num_workers": 8, **overrides}) for name, overrides in ARMS.items()}
    return Study(config, arms, learning_rates=(0.008, 0.016, 0.032), tuning_seeds=1, seeds=5)
