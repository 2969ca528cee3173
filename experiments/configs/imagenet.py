"""ResNet-50 on ImageNet, for pods and hosts with accelerators: 90 epochs, 32 images per worker of one device.

    python experiments/preflight.py --config=experiments/configs/imagenet.py --topology=v5e:16x16

compiles it for a pod that is not here. It was never trained by us. What is not here is as in `fashion_mnist.py`.
"""

import ml_collections

from experiments.configs import fashion_mnist


def get_config() -> ml_collections.ConfigDict:
    config = fashion_mnist.get_config()
    config.num_workers = 256
    config.batch_size = 8192  # of all workers together
    config.eval_batch_size = 8192

    config.dataset.name = "imagenet2012"
    config.dataset.eval_split = "validation"
    config.dataset.augment = True  # crops of random size, and flips

    config.model.name = "resnet50"
    config.model.options = ml_collections.ConfigDict({"norm": "batch"})

    config.optimizer.learning_rate = 3.2  # 0.1 per 256 images
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup = 5 / 90

    config.epochs = 90.0
    return config
