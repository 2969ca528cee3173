"""AllReduce-SGD on ImageNet as the paper ran it (figures 6 to 8): ResNet-50, global batch 86,016, LARS, 90 epochs.

    python -m experiments.train --config=experiments/configs/imagenet_resnet50_allreduce.py --workdir=runs/allreduce

8 workers of one accelerator; the paper's top-1: 75.67 (4 nodes of 2 V100). Ours: not run. Everything else:
`as_the_paper` in `imagenet.py`.
"""

import ml_collections

from experiments.configs import imagenet


def get_config() -> ml_collections.ConfigDict:
    config = imagenet.as_the_paper()
    config.algorithm = "allreduce"
    return config
