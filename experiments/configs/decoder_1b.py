"""`decoder.py` with 1.03 billion parameters, for pods: 20 layers of width 2048, sequences of 2048 bytes, bfloat16.

    python -m experiments.preflight --config=experiments/configs/decoder_1b.py --topology=v5p:4x4x4

compiles it for a pod that is not here: four workers, each sharded over 16 chips. It was never trained by us.
Everything else: `decoder.py`.
"""

import ml_collections

from experiments.configs import decoder


def get_config() -> ml_collections.ConfigDict:
    config = decoder.get_config()
    config.num_workers = 4
    config.inner.fsdp = 16
    config.dataset.eval_split = "test"
    config.dataset.sequence = 2048

    # Per layer 4 × 2048² of attention, 3 × 2048 × 5632 of the MLP and 2 × 2048; 1.1 million at both ends.
    options = {
        "num_layers": 20,
        "width": 2048,
        "num_heads": 16,
        "mlp_width": 5632,
        "remat": True,
        "dtype": "bfloat16",
    }
    config.model.options.update(options)

    config.schedule.learning_rate = 3e-4
    config.schedule.warmup = 0.01

    config.batch_size = 256
    config.eval_batch_size = 256
    config.steps = 20_000
    config.checkpoint.every = 500  # 12 GB per worker: parameters and Adam's moments
    return config
