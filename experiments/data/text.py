"""Text as examples: windows of bytes, one after the other, each with the bytes that follow."""

import functools
import glob
import os
import pathlib

import numpy as np
from jaxtyping import Int32, UInt8

from experiments.data.sources import DataMissing

Windows = tuple[UInt8[np.ndarray, "examples sequence"], Int32[np.ndarray, "examples sequence"]]


@functools.cache
def splits(data_dir: str | pathlib.Path, sequence: int) -> dict[str, Windows]:
    """Windows of `sequence` bytes of all text in `data_dir`, `[examples, sequence]` each, by the names of three parts.

    "test" is the last tenth of the bytes, "validation", for tuning, the tenth before, and "train" the rest. The windows
    of "train+validation" are those of the first nine tenths in one piece. Read once per process, for everybody and
    therefore read-only. Raises `DataMissing` where there are no files.
    """
    paths = files(data_dir)
    if not paths:
        raise DataMissing(
            f"No text in {data_dir}: `config.dataset.data_dir` must be a file, a folder, or a pattern such as "
            "'texts/**/*.txt'. English comes by `python -m experiments.data.prepare gcide --data_dir data`."
        )
    text = np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)
    tenth = len(text) // 10
    border = len(text) - tenth
    inputs, labels = windows(text[:border], sequence)
    held_out = (border - tenth) // sequence  # a window across the border is held out
    return {
        "train": (inputs[:held_out], labels[:held_out]),
        "validation": (inputs[held_out:], labels[held_out:]),
        "test": windows(text[border:], sequence),
    }


def files(data_dir: str | pathlib.Path) -> list[pathlib.Path]:
    """The files that `data_dir` means, in the order of their paths: one, all in a folder, or those of a pattern."""
    pattern = os.path.expanduser(data_dir)
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**")
    return sorted(path for path in map(pathlib.Path, glob.glob(pattern, recursive=True)) if path.is_file())


def windows(text: UInt8[np.ndarray, "bytes"], sequence: int) -> Windows:
    """`text` cut into inputs of `sequence` bytes, and for each byte the one behind it; what is left over is dropped.

    >>> inputs, labels = windows(np.frombuffer(b"abcdefgh", np.uint8), 3)
    >>> [row.tobytes() for row in inputs], [bytes(row.tolist()) for row in labels]
    ([b'abc', b'def'], [b'bcd', b'efg'])
    """
    used = max(len(text) - 1, 0) // sequence * sequence
    inputs, labels = (text[start : start + used].reshape(-1, sequence) for start in (0, 1))
    labels = labels.astype(np.int32)
    labels.flags.writeable = False
    return inputs, labels
