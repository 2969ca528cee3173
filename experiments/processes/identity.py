"""Digests: which code this is, and short names of long values."""

import hashlib
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = [ROOT / part for part in ("crossover_jax", "experiments")]


def digest(*parts: bytes | np.ndarray) -> str:
    """Twelve characters that stand for the bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return found.hexdigest()[:12]


def code_version() -> str:
    """A digest of the sources of the library and of the experiments."""
    files = sorted(path for source in SOURCES for path in source.rglob("*.py"))
    return digest(*(part for path in files for part in (path.name.encode(), path.read_bytes())))
