"""Crossover-SGD on ImageNet as the paper ran it (figures 6 to 8): 18 segments, each with its own permutation.

    python -m experiments.train --config=experiments/configs/imagenet_resnet50_crossover.py --workdir=runs/crossover

8 workers of one accelerator; the paper's top-1: 75.73, and 74.06 with 64 workers (--config.num_workers=64, 32 images in
a micro-batch). Ours: not run. Permutations come from a pool of 16; theirs were drawn anew each time. Everything else:
`as_the_paper` in `imagenet.py`.
"""

import ml_collections

from experiments.configs import imagenet


def get_config() -> ml_collections.ConfigDict:
    config = imagenet.as_the_paper()
    config.algorithm = "crossover_paper"
    config.schedule.learning_rate = 11.0
    return config
