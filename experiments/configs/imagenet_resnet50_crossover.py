"""Crossover-SGD on ImageNet as the paper ran it (figures 6 to 8): 18 segments, each with its own permutation.

    python experiments/train.py --config=experiments/configs/imagenet_resnet50_crossover.py --workdir=runs/crossover

8 workers of one accelerator; the paper's top-1: 75.73, and 74.06 with 64 workers (--config.num_workers=64, 32 images in
a micro-batch). Ours: not run. Permutations come from a pool of 16; theirs were drawn anew each time. The rest is as in
`imagenet_resnet50_allreduce.py`.
"""

import ml_collections

from experiments.configs import imagenet_resnet50_allreduce


def get_config() -> ml_collections.ConfigDict:
    config = imagenet_resnet50_allreduce.get_config()
    config.algorithm.name = "crossover_paper"
    config.algorithm.pool_size = 16
    config.optimizer.learning_rate = 11.0
    return config
