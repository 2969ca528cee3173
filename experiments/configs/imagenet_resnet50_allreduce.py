"""AllReduce-SGD on ImageNet as the paper ran it (figures 6 to 8): ResNet-50, global batch 86,016, LARS, 90 epochs.

    python experiments/train.py --config=experiments/configs/imagenet_resnet50_allreduce.py --workdir=runs/allreduce

8 workers of one accelerator, each 42 micro-batches of 256 images per step, 1341 steps; the paper: 75.67 % (4 nodes
of 2 V100). Ours: not run. What is not here is as in `imagenet.py`. Left out: gradients clipped at a norm of 1000, which
never happened, and the last micro-batch of an epoch, which was smaller.
"""

import ml_collections

from experiments.configs import imagenet


def get_config() -> ml_collections.ConfigDict:
    config = imagenet.get_config()
    config.algorithm.name = "allreduce"
    config.num_workers = 8
    config.batch_size = 86_016
    config.micro_batches = 42
    config.eval_batch_size = 1024
    config.label_smoothing = 0.1

    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 9.0
    config.optimizer.momentum = 0.96
    config.optimizer.weight_decay = 5e-5
    config.optimizer.trust_coefficient = 0.0025
    config.optimizer.warmup = 36 / 90
    config.optimizer.decay = "polynomial"
    config.optimizer.power = 2.2
    config.optimizer.end = 0.0025
    config.optimizer.tail = 2 / 90
    return config
