"""Where files may lie: on file systems of this machine, mounted ones included."""

import os
import pathlib
import re

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # of two slashes pathlib leaves one


def local_path(name: str, path: str | os.PathLike) -> pathlib.Path:
    """A path of this machine. Raises `ValueError` for a URL: locks, appended rows and renames need a file system.

    >>> local_path("workdir", "gs://bucket/run")
    Traceback (most recent call last):
    ValueError: `workdir` must be a path of this machine, got gs://bucket/run: URLs are not opened; mount the bucket...
    """
    if URL.match(str(path)):
        raise ValueError(
            f"`{name}` must be a path of this machine, got {path}: URLs are not opened; mount the bucket, as gcsfuse "
            "or mount-s3 does, and name a folder there."
        )
    return pathlib.Path(path).expanduser()
