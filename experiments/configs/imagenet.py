"""ResNet-50 on ImageNet, for pods and hosts with accelerators: 90 epochs, 32 images per worker of one device.

    python -m experiments.preflight --config=experiments/configs/imagenet.py --topology=v5e:16x16

compiles it for a pod that is not here. It was never trained by us. Everything else: `default.py`.
"""

import ml_collections

from experiments.configs import default


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.num_workers = 256
    config.batch_size = 8192  # of all workers together
    config.eval_batch_size = 8192
    config.epochs = 90.0

    config.dataset.name = "imagenet2012"
    config.dataset.eval_split = "validation"
    config.dataset.augment = True  # crops of random size, and flips

    config.model.name = "resnet50"
    config.model.options = ml_collections.ConfigDict({"norm": "batch"})

    config.schedule.learning_rate = 3.2  # 0.1 per 256 images
    config.schedule.warmup = 5 / 90
    config.sgd.weight_decay = 1e-4
    return config


def as_the_paper() -> ml_collections.ConfigDict:
    """What the paper's runs of figures 6 to 8 have in common: a global batch of 86,016 by 8 workers, and LARS.

    Each worker has 42 micro-batches of 256 images per step, 1341 steps. Left out: gradients clipped at a norm of 1000,
    which never happened, and the last micro-batch of an epoch, which was smaller.
    """
    config = get_config()
    config.num_workers = 8
    config.batch_size = 86_016
    config.micro_batches = 42
    config.eval_batch_size = 1024
    config.label_smoothing = 0.1

    config.schedule.learning_rate = 9.0
    config.schedule.warmup = 36 / 90
    config.schedule.decay = "polynomial"
    config.schedule.polynomial.tail = 2 / 90

    config.sgd = default.get_config().sgd  # chosen is another
    config.optimizer = "lars"
    config.lars.momentum = 0.96
    config.lars.weight_decay = 5e-5
    return config
