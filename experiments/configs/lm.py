"""Eight workers train a byte-level decoder of 0.15 million parameters by Crossover-SGD: what `make lm` runs.

    python -m experiments.train --config=experiments/configs/lm.py --workdir=runs/lm

The text is Python's own standard library, as in `decoder.py`. Evaluated is on ten places of the tenth of it before the
last, on which learning rates are tuned; the last, "test", is for the end of a study. After 800 steps, seven minutes on
two busy cores with eight virtual devices, it takes the averaged model 2.085 bits a byte. Everything else: `default.py`.
"""

import sysconfig

import ml_collections

from experiments.configs import default


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.batch_size = 64  # of all workers together: 4096 bytes
    config.steps = 800
    config.eval_every = 0.15  # epochs
    config.eval_batch_size = 256  # on a mesh, a multiple of the number of devices

    config.dataset.name = "text"
    config.dataset.data_dir = f"{sysconfig.get_path('stdlib')}/*.py"  # a file, a folder or a pattern of files
    places = [f"validation[{i}%:{i + 1}%]" for i in range(0, 100, 10)]  # all of it would take longer than training
    config.dataset.eval_split = "+".join(places)
    config.dataset.sequence = 64  # bytes of an example

    # Per layer 4 × 64² of attention, 3 × 64 × 224 of the MLP and 2 × 64; 32,832 at both ends: 151,872 in all.
    config.model.name = "decoder"
    config.model.options = ml_collections.ConfigDict(
        {"num_layers": 2, "width": 64, "num_heads": 4, "mlp_width": 224, "remat": False, "dtype": "float32"}
    )

    config.schedule.learning_rate = 0.016
    config.schedule.cosine.end = 0.1
    config.optimizer = "adamw"
    config.adamw.b2 = 0.99
    config.adamw.weight_decay = 0.1
    config.clip_norm = 1.0

    config.crossover.rounds = 3
    config.crossover.wire = "int8"
    return config
