"""The folder of a run: opened and held by one process, with the rows of metrics that it has so far."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments import processes
from experiments.paths import local_path

Row = dict[str, Any]
METRICS = "metrics.jsonl"
CONFIG = "config.json"
STATUS = "status.json"


def open_workdir(path: str | os.PathLike) -> pathlib.Path:
    """The folder, made if it is missing. Raises `ValueError` if it is none or cannot be written."""
    workdir = local_path("workdir", path)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / METRICS).touch()
    except OSError as error:
        raise ValueError(f"`workdir` must be a folder that can be written, got {path}: {error.strerror}.") from None
    return workdir


def require_no_rows(workdir: pathlib.Path) -> None:
    """Raise `ValueError` if there are metrics of a run that cannot be resumed."""
    if (workdir / METRICS).stat().st_size:
        raise ValueError(
            f"`workdir` must not hold the {METRICS} of a run without checkpoints, got {workdir}: name another one."
        )


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Hold `workdir` for this process; the system lets go of it however the process ends. Raises `ValueError`."""
    with open(workdir / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"`workdir` must be of one run at a time, got {workdir} where another runs.") from None
        except OSError as error:  # a file system without locks
            processes.say(f"WARNING: two runs on {workdir} would not notice each other: {error.strerror}")
        yield


def read_rows(workdir: pathlib.Path, last_step: int) -> list[Row]:
    """The rows up to `last_step`; a line that a dying process left unfinished is none."""
    rows = []
    for line in (workdir / METRICS).read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if (rows[-1]["step"] if rows else 0) < row["step"] <= last_step:
                rows.append(row)
    return rows


def append(path: pathlib.Path, text: str) -> None:
    """Add to a file all or nothing, on the disk when it returns: a checkpoint must not be newer than its rows."""
    size = path.stat().st_size
    try:
        with open(path, "a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        os.truncate(path, size)
        raise


def rewrite(path: pathlib.Path, text: str) -> None:
    """Replace a file by another in one step."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)
