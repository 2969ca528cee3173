"""ResNet-20 on CIFAR-10 by 16 workers, an exchange at every step: the task of the paper's figure 9, a matter of time.

    python -m experiments.data.prepare cifar10
    python -m experiments.train --config=experiments/configs/cifar10_resnet.py --workdir=runs/cifar10

For hosts with accelerators, 64 images per worker and step; 200 epochs. The paper compares how many times faster 16
workers are than 4: AllReduce 2.4, SGP 3.4, Crossover-SGD 3.3. Its caption says ResNet-50, its program builds a
ResNet-18, and it gives no accuracy. Ours: not run. Everything else: `default.py`.
"""

import ml_collections

from experiments.configs import default


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.num_workers = 16
    config.batch_size = 1024
    config.eval_batch_size = 2000
    config.epochs = 200.0

    config.dataset.name = "cifar10"
    config.dataset.augment = True

    config.model.name = "resnet20"
    config.model.options = ml_collections.ConfigDict({"norm": "batch"})

    config.schedule.learning_rate = 0.4  # 0.1 per 256 images
    return config
