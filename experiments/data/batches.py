"""Batches for any number of workers and processes, from one stream of examples that they all share."""

import dataclasses
import functools
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jaxtyping import Int

from experiments.data import augment as augmentation
from experiments.data.datasets import Arrays, Dataset


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    part: tuple[slice, slice] | None = None,
    augment: bool = True,
    start_step: int = 0,
    num_threads: int = 1,
) -> grain.DatasetIterator:
    """Endless training batches of one process, from `start_step` on.

    Each is a dict of `image`, uint8 `[local workers, per worker, height, width, channels]`, and `label`, int32
    `[local workers, per worker]`. `batch_size` counts the examples of ALL workers. Epochs are permutations, one after
    the other in a single stream: the batch of step t holds its examples `t * batch_size` to `(t + 1) * batch_size`, so
    it may straddle two epochs and nothing is dropped. Worker w has the w-th part of the batch. A process reads `part`
    of `[workers, per worker]`, what its devices hold (`crossover_jax.local_part`; None: all). Put together, a batch is
    therefore the same array, augmentation included, for every number of workers and processes. Text has `image` and
    `label` `[local workers, per worker, sequence]`.

    The iterator is grain's: its state is `{"next_index": step}`, and `set_state` resumes a run at any step, also with
    another number of workers. `num_threads` batches are read at once; more than one pays for sets on disk only.
    Raises `ValueError` when the workers do not divide `batch_size`, and for `augment` of text.
    """
    if augment and dataset.in_memory and dataset.pad is None:
        raise ValueError(f"`augment` must be False for {dataset.name}, got {augment}.")
    _require_multiple("batch_size", batch_size, "num_workers", num_workers)
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}.")
    rows = np.arange(batch_size).reshape(num_workers, -1)[part or ...]
    batches = grain.MapDataset.range(2**62).map(
        _TrainBatch(dataset, batch_size, rows.reshape(-1), rows.shape, seed, augment)
    )
    # One batch ahead per thread: what waits here is memory, up to 77 MB for 512 images of ImageNet.
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads + 1)))
    iterator.set_state({"next_index": start_step})
    return iterator


def eval_batches(dataset: Dataset, *, batch_size: int, num_threads: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """All examples of a split, each exactly once, in batches of equal size.

    Each is a dict of `image`, uint8 `[rows, height, width, channels]`, `label`, int32 `[rows]`, and `mask`, bool
    `[rows]`, False where the last batch is filled up with examples that have been counted. Every process reads the
    whole split: each of its workers is evaluated on all of it.
    """
    num_batches = -(-len(dataset) // batch_size)
    batches = grain.MapDataset.range(num_batches).map(_EvalBatch(dataset, batch_size))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads + 1)))


def batch_shapes(dataset: Dataset, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `rows` examples, which is one worker's batch; `dataset` need not hold its examples."""
    return {
        "image": jax.ShapeDtypeStruct((rows, *dataset.image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((rows, *dataset.label_shape), np.int32),
    }


def eval_arrays(dataset: Dataset) -> Arrays:
    """Images `[examples, height, width, channels]` and labels of a whole split.

    Raises `ValueError` for a set that is read from disk.
    """
    if not dataset.in_memory:
        raise ValueError(f"{dataset.name} is too large for memory; use `eval_batches`.")
    return dataset.source


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """The rows of one process of the batch of a step: a pure function of the step, so it can start anywhere."""

    dataset: Dataset
    batch_size: int
    rows: np.ndarray
    shape: tuple[int, int]
    seed: int
    augment: bool

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        step = int(step)
        places = shuffled(step * self.batch_size + self.rows, len(self.dataset), self.seed)
        image, label = self._read(step, places)
        return {
            "image": image.reshape(*self.shape, *image.shape[1:]),
            "label": label.reshape(*self.shape, *label.shape[1:]),
        }

    def _read(self, step: int, places: np.ndarray) -> Arrays:
        if not self.augment:
            return _read(self.dataset, places)
        how = dict(flip=self.dataset.flip, seed=self.seed, step=step)
        if not self.dataset.in_memory:
            size = _size(self.dataset)
            crops = [functools.partial(augmentation.random_crop, size=size, row=row, **how) for row in self.rows]
            return _read_encoded(self.dataset, places, crops)
        assert self.dataset.pad is not None  # what is in memory is shifted, not cropped
        image, label = _read(self.dataset, places)
        image = augmentation.shift_and_flip(
            image, pad=self.dataset.pad, rows=self.rows, batch_size=self.batch_size, **how
        )
        return Arrays(image, label)


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    dataset: Dataset
    batch_size: int

    def __call__(self, batch: int) -> dict[str, np.ndarray]:
        places = int(batch) * self.batch_size + np.arange(self.batch_size)
        mask = places < len(self.dataset)
        return {**_read(self.dataset, np.where(mask, places, 0))._asdict(), "mask": mask}


def _read(dataset: Dataset, places: np.ndarray) -> Arrays:
    if dataset.in_memory:
        return Arrays(dataset.source.image[places], dataset.source.label[places])
    crop = functools.partial(augmentation.central_crop, size=_size(dataset))
    return _read_encoded(dataset, places, [crop] * len(places))


def _size(dataset: Dataset) -> tuple[int, int]:
    height, width, _ = dataset.image_shape
    return height, width


def _read_encoded(dataset: Dataset, places: np.ndarray, crops: list) -> Arrays:
    examples = dataset.source.__getitems__(places.tolist())
    images = np.empty((len(places), *dataset.image_shape), np.uint8)
    for image, example, crop in zip(images, examples, crops, strict=True):
        image[:] = crop(example["image"])
    return Arrays(images, np.array([example["label"] for example in examples], np.int32))


def shuffled(positions: Int[np.ndarray, "rows"], num_examples: int, seed: int) -> Int[np.ndarray, "rows"]:
    """The examples at `positions` of an endless stream of permutations of `num_examples`, one per epoch.

    >>> sorted(shuffled(np.arange(5, 10), 5, seed=0).tolist())
    [0, 1, 2, 3, 4]
    """
    epochs, within = np.divmod(positions, num_examples)
    examples = np.empty_like(within)
    for epoch in np.unique(epochs):
        examples[epochs == epoch] = _permutation(num_examples, seed, int(epoch))[within[epochs == epoch]]
    return examples


@functools.lru_cache(maxsize=4)  # two epochs meet in a batch; drawing anew takes 20 ms for 1.28 million
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, augmentation.SHUFFLE, epoch)).permutation(num_examples)


def _require_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if divisor < 1:
        raise ValueError(f"`{of}` must be at least 1, got {divisor}.")
    if value < 1 or value % divisor:
        below = value // divisor * divisor
        near = " or ".join(str(multiple) for multiple in (below, below + divisor) if multiple > 0)
        raise ValueError(
            f"`{name}` must be a multiple of `{of}`, got {value} and {divisor}; the nearest `{name}` is {near}."
        )
