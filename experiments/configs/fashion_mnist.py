"""Eight workers train a small ResNet on the full Fashion-MNIST by Crossover-SGD: what `make train` runs.

    python -m experiments.train --config=experiments/configs/fashion_mnist.py --workdir=runs/fashion_mnist

Everything else: `default.py`. `--config.key=value` changes one key.
"""

import ml_collections

from experiments.configs import default


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.dataset.name = "fashion_mnist"
    config.model.name = "resnet8"
    config.model.options = ml_collections.ConfigDict({"width": 16, "stem_stride": 2, "norm": "batch"})
    return config
