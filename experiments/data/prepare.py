"""Prepare a data set as TFDS would, without TensorFlow, or a corpus as a file of plain text.

    python -m experiments.data.prepare fashion_mnist --data_dir D
    python -m experiments.data.prepare cifar10 --data_dir D --manual_dir M
    python -m experiments.data.prepare imagenet2012 --data_dir D --from_tfrecord OLD
    python -m experiments.data.prepare gcide --data_dir D

The result has the standard name, version, features and files, as ArrayRecord: `tfds.data_source` finds it as usual. Of
a corpus it is D/gcide.txt, for --config.dataset.name=text --config.dataset.data_dir=D/gcide.txt.
"""

import argparse
import sys

from experiments.data.builders import BUILDERS, prepare
from experiments.data.corpora import CORPORA, prepare_text
from experiments.data.sources import DataMissing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*BUILDERS, *CORPORA])
    parser.add_argument("--data_dir", required=True, help="where TFDS data sets lie, and text")
    parser.add_argument("--manual_dir", help="folder with the raw files")
    parser.add_argument("--from_tfrecord", help="data_dir of the data set as TFRecord, to be converted")
    parser.add_argument("--num_shards", type=int, help="files per split (default: by size, as TFDS decides)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.name in CORPORA:
            print(_text_of(arguments))
            return 0
        builder = prepare(**vars(arguments))
    except (DataMissing, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    counts = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    print(f"{builder.info.full_name} is ready in {builder.data_dir}: {counts} examples.")
    return 0


def _text_of(arguments: argparse.Namespace) -> str:
    """Prepare a corpus, and say where it lies. Raises `ValueError` for arguments of data sets only."""
    for name in ("from_tfrecord", "num_shards"):
        if (value := getattr(arguments, name)) is not None:
            raise ValueError(f"`--{name}` must be left out for {arguments.name}, which is text, got {value}.")
    path = prepare_text(arguments.name, data_dir=arguments.data_dir, manual_dir=arguments.manual_dir)
    return f"{arguments.name} is ready in {path}: {path.stat().st_size} bytes."


if __name__ == "__main__":
    sys.exit(main())
