"""Text for people."""

from collections.abc import Iterable
from typing import Any


def as_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Columns as wide as their widest entry, the first to the left.

    >>> print(as_table(("wire", "MB"), [("float32", 26.0), ("int8", 6.6)]))
    wire       MB
    float32  26.0
    int8      6.6
    """
    lines = [[str(entry) for entry in line] for line in (header, *rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    aligned = [[line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in aligned)
