"""Data sets by their TFDS names, prepared and read without TensorFlow; and text, as it lies in files.

Two lines feed a training run:

    train = load("fashion_mnist", "train", data_dir=data_dir)
    for batch in train_batches(train, batch_size=256, num_workers=8, seed=0): ...
"""

from experiments.data.batches import batch_shapes, eval_arrays, eval_batches, train_batches
from experiments.data.datasets import DATASETS, Arrays, Dataset, describe, load
from experiments.data.sources import DataMissing

__all__ = [
    "DATASETS",
    "Arrays",
    "DataMissing",
    "Dataset",
    "batch_shapes",
    "describe",
    "eval_arrays",
    "eval_batches",
    "load",
    "train_batches",
]
