"""Rows of results in CSV files, to which each run adds its own.

A process may be killed while it writes: what it had written before stays, and a line without an end is none.
"""

import csv
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def read(path: pathlib.Path, parse: Callable[[str], Any] | None = None) -> list[Row]:
    """The rows of earlier calls, their cells by `parse`, or numbers as numbers; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [
        {name: (parse or number)(text) for name, text in row.items()}
        for row in csv.DictReader(whole)
        if None not in row and None not in row.values()
    ]


def number(text: str) -> Any:
    """The integer or the float that a cell holds, else its text.

    >>> number("8"), number("0.5"), number("crossover")
    (8, 0.5, 'crossover')
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def append(path: pathlib.Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Add rows, below the names of the columns where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_unfinished(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def drop_unfinished(path: pathlib.Path) -> None:
    """Take off a line that a dying process left without an end, or the next row would be a part of it."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)
