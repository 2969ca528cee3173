"""SGP on ImageNet as the paper ran it (figures 6 to 8), with one peer per round.

    python experiments/train.py --config=experiments/configs/imagenet_resnet50_sgp.py --workdir=runs/sgp

8 workers of one accelerator; the paper's top-1: 75.35, and 73.13 with 64 workers (--config.num_workers=64, 32 images in
a micro-batch). Ours: not run. Their scripts have versions with one, two and three peers (--config.algorithm.peers=2);
which of them made the figures is not known. The rest is as in `imagenet_resnet50_allreduce.py`.
"""

import ml_collections

from experiments.configs import imagenet_resnet50_allreduce


def get_config() -> ml_collections.ConfigDict:
    config = imagenet_resnet50_allreduce.get_config()
    config.algorithm.name = "sgp"
    return config
