"""TFDS builders without TensorFlow: the stock ones, except for how they read the raw files."""

import contextlib
import fcntl
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds
from tensorflow_datasets.core.read_only_builder import builder_from_files
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as stock_imagenet
from tensorflow_datasets.image_classification import cifar as stock_cifar
from tensorflow_datasets.image_classification import mnist as stock_mnist

from experiments.data import convert, raw, sources
from experiments.data.sources import DataMissing
from experiments.paths import local_path

Splits = dict[str, Callable[[], raw.Examples]]


def prepare(
    name: str,
    *,
    data_dir: str | pathlib.Path,
    manual_dir: str | pathlib.Path | None = None,
    from_tfrecord: str | pathlib.Path | None = None,
    num_shards: int | None = None,
) -> tfds.core.DatasetBuilder:
    """The builder of data set `name` in `data_dir`, which is prepared first if it is not there.

    Raw files come from `manual_dir`; Fashion-MNIST finds or fetches its own. `from_tfrecord` is another data
    directory, in which TFDS has prepared `name` as TFRecord, to be converted. `num_shards` is per split; None leaves
    it to TFDS, as the size decides. Raises `DataMissing` with the commands to type when the files are not to be had
    and `ValueError` for an unknown name or a corrupt file.

    Of several processes that start at the same time one prepares and the others wait. An interrupted preparation
    leaves at most a folder `incomplete.*`, which nobody takes for the data and which may be deleted.
    """
    if name not in BUILDERS:
        raise ValueError(f"`name` must be one of {', '.join(BUILDERS)}, got {name!r}.")
    if (builder := find(name, data_dir)) is not None:
        return builder
    data_dir = local_path("data_dir", data_dir)  # data may be read from a bucket, but not prepared in one
    with _one_at_a_time(data_dir, name):
        if (builder := find(name, data_dir)) is not None:  # another process has prepared it meanwhile
            return builder
        if from_tfrecord is not None:
            convert.convert(name, pathlib.Path(from_tfrecord).expanduser(), data_dir)
        else:
            _build(name, data_dir, manual_dir, num_shards)
    return find(name, data_dir)


def find(name: str, data_dir: str | pathlib.Path) -> tfds.core.DatasetBuilder | None:
    """The builder of `name` as prepared in `data_dir`; None when it is not there.

    Raises `DataMissing` when it is there, but as TFRecord, which cannot be read at random places, and for a bucket
    whose package is not installed.
    """
    try:
        builder = builder_from_files(name, data_dir=os.path.expanduser(data_dir))  # text: a Path spoils gs://
    except tfds.core.DatasetNotFoundError:
        return None
    except ImportError as error:
        raise DataMissing(f"{name} in {data_dir} cannot be read: {error}.") from None
    if builder.info.file_format.value != "array_record":
        raise DataMissing(
            f"{name} in {data_dir} is prepared as {builder.info.file_format.value}; training reads array_record.\n"
            "Convert it into another folder and pass that as data_dir:\n"
            f"  python -m experiments.data.prepare {name} --data_dir NEW --from_tfrecord {data_dir}"
        )
    return builder


def _build(name: str, data_dir: pathlib.Path, manual_dir: str | pathlib.Path | None, num_shards: int | None) -> None:
    stock, package, read = BUILDERS[name]
    with tempfile.TemporaryDirectory() as scratch:
        found = sources.raw_files(name, data_dir, manual_dir, pathlib.Path(scratch))
        splits, label_names = read(found)

        # pyrefly: ignore[invalid-inheritance]  (the stock builder is chosen by name)
        class Offline(stock, skip_registration=True):
            pkg_dir_path = tfds.core.tfds_path(package)

            def _split_generators(self, dl_manager):
                if label_names is not None:
                    self.info.features["label"].names = label_names
                return {split: self._generate_examples(examples) for split, examples in splits.items()}

            def _generate_examples(self, examples):
                return examples()

        Offline.name = name
        print(f"{name}: written to {data_dir}.", flush=True)
        # TFDS writes into a folder incomplete.* and renames it: a killed run leaves no version folder behind.
        Offline(data_dir=os.fspath(data_dir), file_format="array_record").download_and_prepare(
            download_dir=scratch,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=num_shards),
        )


def _read_idx(name: str, files: list[pathlib.Path]) -> tuple[Splits, None]:
    data = [sources.read_checked(name, file) for file in files]
    return {
        "train": functools.partial(raw.idx_examples, *data[:2]),
        "test": functools.partial(raw.idx_examples, *data[2:]),
    }, None


def _read_cifar10(files: list[pathlib.Path]) -> tuple[Splits, list[str]]:
    members = raw.cifar10_files(sources.read_checked("cifar10", files[0]))
    train = [members[f"data_batch_{i}.bin"] for i in range(1, 6)]
    return {
        "train": functools.partial(raw.cifar10_examples, "train", train),
        "test": functools.partial(raw.cifar10_examples, "test", [members["test_batch.bin"]]),
    }, members["batches.meta.txt"].decode().split()


def _read_imagenet(files: list[pathlib.Path]) -> tuple[Splits, None]:
    return {
        "train": functools.partial(raw.imagenet_train_examples, files[0]),
        "validation": functools.partial(raw.imagenet_validation_examples, files[1]),
    }, None


# Stock builder, where its README and citations lie within TFDS, reader of its raw files.
BUILDERS = {
    "fashion_mnist": (stock_mnist.FashionMNIST, "image_classification", functools.partial(_read_idx, "fashion_mnist")),
    "mnist": (stock_mnist.MNIST, "image_classification", functools.partial(_read_idx, "mnist")),
    "cifar10": (stock_cifar.Cifar10, "image_classification", _read_cifar10),
    "imagenet2012": (stock_imagenet.Builder, "datasets/imagenet2012", _read_imagenet),
}


@contextlib.contextmanager
def _one_at_a_time(data_dir: pathlib.Path, name: str) -> Iterator[None]:
    """Hold the lock of `name` in `data_dir`: without it the second process to finish fails at its last rename."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, also when that is killed
        yield
