"""Corpora of natural language as files of plain text, which the data set "text" reads: taken out of Debian packages.

The text stays on the machine that prepares it. Its licence, by name:

gcide   the GNU Collaborative International Dictionary of English, GPL-2 or later; 40 MB in dict-gcide 0.48.5
"""

import gzip
import os
import pathlib
import tempfile
import zlib

from experiments.data import sources
from experiments.paths import local_path

CORPORA = ("gcide",)


def prepare_text(
    name: str, *, data_dir: str | pathlib.Path, manual_dir: str | pathlib.Path | None = None
) -> pathlib.Path:
    """The file `data_dir`/NAME.txt of corpus `name`, which is unpacked first if it is not there.

    Its raw file comes from `manual_dir`, from where Debian's package puts it, or out of the package, without root. The
    bytes are those of the package: another release of it is another text, which the digest of a run's data tells.
    Raises `DataMissing` with the commands to type when it is not to be had and `ValueError` for an unknown name or a
    corrupt file; an interrupted preparation leaves no file of that name.
    """
    if name not in CORPORA:
        raise ValueError(f"`name` must be one of {', '.join(CORPORA)}, got {name!r}.")
    data_dir = local_path("data_dir", data_dir)
    path = data_dir / f"{name}.txt"
    if path.exists():
        return path
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".") as scratch:  # hidden: a pattern does not take it
        (packed,) = sources.raw_files(name, data_dir, manual_dir, pathlib.Path(scratch))
        unfinished = pathlib.Path(scratch) / path.name
        unfinished.write_bytes(_unpacked(packed))
        os.replace(unfinished, path)
    return path


def _unpacked(path: pathlib.Path) -> bytes:
    """Contents of a gzip file, which a file of dictzip is; its own checksum tells whether it is whole."""
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip file, got {error}: delete it and fetch it again.") from None
