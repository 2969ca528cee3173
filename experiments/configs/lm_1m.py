"""`lm.py` with a million parameters: four layers of width 128.

    python -m experiments.train --config=experiments/configs/lm_1m.py --workdir=runs/lm_1m

Everything else: `lm.py`.
"""

import ml_collections

from experiments.configs import lm


def get_config() -> ml_collections.ConfigDict:
    config = lm.get_config()
    # Per layer 4 × 128² of attention, 3 × 128 × 448 of the MLP and 2 × 128; 65,664 at both ends: 1,016,960 in all.
    config.model.options.update({"num_layers": 4, "width": 128, "mlp_width": 448})
    return config
