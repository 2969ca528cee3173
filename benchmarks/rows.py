"""Rows of measurements: CSV files that commands add to."""

import csv
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def append_rows(path: pathlib.Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, with a header where the file is new."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a CSV file; of one that does not exist, none."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
