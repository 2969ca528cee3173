"""Hierarchical Crossover-SGD on ImageNet as the paper ran it (figure 8): 64 accelerators in 8 gossiping groups.

    python -m experiments.train --config=experiments/configs/imagenet_resnet50_hierarchical.py --workdir=runs/groups

8 workers of 8 accelerators, each with 32 images of a micro-batch and its own BatchNorm statistics; the paper's top-1:
75.73. Ours: not run. Everything else: `imagenet_resnet50_crossover.py`.
"""

import ml_collections

from experiments.configs import imagenet_resnet50_crossover


def get_config() -> ml_collections.ConfigDict:
    config = imagenet_resnet50_crossover.get_config()
    config.model.options.bn_groups = 8
    return config
