"""`Dataset`: one split of a data set, its shapes and constants, readable at any place."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32, UInt8
from PIL import Image

from experiments.data import text
from experiments.data.builders import find, prepare
from experiments.data.sources import missing


class Arrays(NamedTuple):
    """Decoded examples: images with a class each, or windows of text, under the same name, with every next byte."""

    image: UInt8[np.ndarray, "examples ..."]
    label: Int32[np.ndarray, "examples ..."]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set: constants of the set, and its examples.

    `image_shape` is (height, width, channels) of what the batches hold, for ImageNet after cropping, and may be
    replaced there; of text it is (sequence,), and so is `label_shape`, () elsewhere. `mean` and `std` are per channel,
    of pixels scaled to [0, 1]: normalise on the device; they are empty for text. Augmentation shifts by up to `pad`
    pixels and flips if `flip`; `pad` None means crops of random size, and for text that there is none.
    `source` is the whole split in memory, or a TFDS source of encoded images for sets that are too large.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int | None
    flip: bool
    label_shape: tuple[int, ...] = ()
    split: str = "train"
    source: Any = None

    def __len__(self) -> int:
        return len(self.source.label if self.in_memory else self.source)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.source, Arrays)

    @property
    def digest(self) -> str:
        """What tells this split from others: its size, and its bytes or, of a set on disk, its recorded shards."""
        found = hashlib.sha256()
        if self.in_memory:
            for array in self.source:
                found.update(np.ascontiguousarray(array).data)
        else:
            info = self.source.dataset_info
            found.update(str((info.full_name, self.split, info.splits["all"].shard_lengths)).encode())
        return f"{self.name}[{self.split}]:{len(self)}:{found.hexdigest()[:12]}"


# Means and standard deviations of the training images; digits are not flipped, a mirrored 2 is no 2.
DATASETS = {
    "fashion_mnist": Dataset("fashion_mnist", 10, (28, 28, 1), (0.2860,), (0.3530,), pad=2, flip=True),
    "mnist": Dataset("mnist", 10, (28, 28, 1), (0.1307,), (0.3081,), pad=2, flip=False),
    "cifar10": Dataset(
        "cifar10", 10, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, flip=True
    ),
    "imagenet2012": Dataset(
        "imagenet2012", 1000, (224, 224, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), pad=None, flip=True
    ),
    "text": Dataset("text", 256, (256,), (), (), pad=None, flip=False, label_shape=(256,)),
}


def describe(name: str, *, sequence: int = 256) -> Dataset:
    """Data set `name` without its examples: shapes and constants. Text comes in windows of `sequence` bytes.

    Raises `ValueError` for an unknown name and for windows of no bytes.
    """
    if name not in DATASETS:
        raise ValueError(f"`name` must be one of {', '.join(DATASETS)}, got {name!r}.")
    if name != "text":
        return DATASETS[name]
    if sequence < 1:
        raise ValueError(f"`sequence` must be at least 1, got {sequence}.")
    return dataclasses.replace(DATASETS[name], image_shape=(sequence,), label_shape=(sequence,))


def load(name: str, split: str, *, data_dir: str | pathlib.Path, sequence: int = 256) -> Dataset:
    """`split` of data set `name`, prepared in `data_dir`; Fashion-MNIST is prepared there if it is not.

    `split` is in TFDS' language: "train", "test", "validation", "train[:90%]", "train[90%:]". Small sets are decoded
    into memory and kept beside their files, 12 s once for Fashion-MNIST, then 0.2 s; slices are views. For "text",
    `data_dir` is a file, a folder or a pattern of files, the same on all hosts, in windows of `sequence` bytes; its
    "validation" is the tenth before the last. Raises `DataMissing` with what to do when the data are not there and
    `ValueError` for an unknown name or split.
    """
    dataset = describe(name, sequence=sequence)
    source = _windows(data_dir, sequence, split) if name == "text" else _prepared(name, split, data_dir)
    dataset = dataclasses.replace(dataset, split=split, source=source)
    if len(dataset) == 0:
        raise ValueError(f"`split` must hold at least one example, got {split!r}.")
    return dataset


def _windows(data_dir: str | pathlib.Path, sequence: int, split: str) -> Arrays:
    arrays = {name: Arrays(*windows) for name, windows in text.splits(data_dir, sequence).items()}
    infos = {name: tfds.core.SplitInfo(name, [len(a.label)], num_bytes=0) for name, a in arrays.items()}
    return _sliced(split, infos, arrays.__getitem__)


def _prepared(name: str, split: str, data_dir: str | pathlib.Path) -> Any:
    builder = find(name, data_dir)
    if builder is None and name == "fashion_mnist":
        builder = prepare(name, data_dir=data_dir)
    if builder is None:
        raise missing(name, data_dir, [])
    if DATASETS[name].pad is None:
        return _encoded(builder, split)
    version_dir = os.fspath(builder.data_dir)
    infos = tfds.builder_from_directory(version_dir).info.splits
    return _sliced(split, infos, functools.partial(_decode_split, name, version_dir))


def _encoded(builder: tfds.core.DatasetBuilder, split: str):
    """A TFDS source of examples whose images are still JPEG or PNG bytes."""
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def _sliced(split: str, infos: dict[str, tfds.core.SplitInfo], read: Callable[[str], Arrays]) -> Arrays:
    """What `split`, in TFDS' language, names of the whole splits that `read` gives."""
    ranges = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    parts = [[a[r.from_ : r.to] for a in read(r.splitname)] for r in ranges]
    return Arrays(*(x[0] if len(x) == 1 else np.concatenate(x) for x in zip(*parts, strict=True)))


@functools.cache
def _decode_split(name: str, version_dir: str, split: str) -> Arrays:
    """All of `split`, decoded; read-only, for every `Dataset` of this process shares it."""
    builder = tfds.builder_from_directory(version_dir)
    kept, stamp = pathlib.Path(version_dir) / f"decoded-{split}.npz", _stamp(builder, split)
    arrays = _kept(kept, stamp)
    if arrays is None:
        try:
            arrays = _decode_all(name, _encoded(builder, split))
        except (RuntimeError, OSError) as error:  # ArrayRecord's hashes and Pillow find what is not as it was written
            raise ValueError(f"{version_dir} is corrupt ({error}): delete it and prepare {name} again.") from error
        _keep(kept, stamp, arrays)
    for array in arrays:
        array.flags.writeable = False
    return arrays


def _stamp(builder: tfds.core.DatasetBuilder, split: str) -> str:
    """What a split's files look like from outside: other files have another one."""
    files = [pathlib.Path(path) for path in builder.info.splits[split].filepaths]
    return str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()])


def _kept(path: pathlib.Path, stamp: str) -> Arrays | None:
    """What was decoded before from the same files. Reading is 50 times as fast as decoding."""
    try:
        with np.load(path) as found:
            return Arrays(found["image"], found["label"]) if str(found["stamp"]) == stamp else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # it is not there, or not whole: zip files have sums
        return None


def _keep(path: pathlib.Path, stamp: str, arrays: Arrays) -> None:
    """For the next process, if the folder can be written; of several at once the last stays."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        unfinished = pathlib.Path(scratch) / path.name
        np.savez(unfinished, image=arrays.image, label=arrays.label, stamp=stamp)
        os.replace(unfinished, path)


def _decode_all(name: str, source: Any) -> Arrays:
    image = np.empty((len(source), *DATASETS[name].image_shape), np.uint8)
    label = np.empty(len(source), np.int32)
    for start in range(0, len(source), 4096):  # TFDS reads many at once three times as fast as one by one
        stop = min(start + 4096, len(source))
        for i, example in enumerate(source.__getitems__(range(start, stop)), start):
            image[i] = np.asarray(Image.open(io.BytesIO(example["image"]))).reshape(image.shape[1:])
            label[i] = example["label"]
    return Arrays(image, label)
