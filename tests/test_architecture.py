"""The arrows of docs/design.md, read from the imports."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ALLOWED = {  # what of ours each part of the library may import
    "topology": set(),
    "cuts": set(),
    "inner": set(),
    "wire": {"cuts"},
    "forms": {"topology", "cuts", "wire"},
    "mixing": {"topology", "cuts", "forms", "inner", "wire"},
    "algorithms": {"topology", "cuts", "mixing"},
    "push_sum": {"topology", "cuts", "forms", "mixing", "algorithms"},
    "presets": {"topology", "cuts", "mixing", "algorithms", "push_sum"},
    "resize": {"cuts", "push_sum"},
    "workers": {"cuts"},
    "specs": set(),
    "consensus": {"cuts"},
    "lars": set(),
    "mesh": set(),
    "compiled": set(),
    "plan": set(),
    "__main__": {"topology", "plan"},
}
LIBRARIES = {"jax", "numpy", "optax", "jaxtyping"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    return path.relative_to(ROOT / "crossover_jax").parts[0].removesuffix(".py")


SOURCES = [p for p in sorted((ROOT / "crossover_jax").rglob("*.py")) if part_of(p) != "__init__"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    part = part_of(path)
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "crossover_jax":
            assert rest[0] in ALLOWED[part] | {part}, f"{path.name} imports {name}"
        assert first != "experiments"
        if part == "topology":
            assert first not in ("jax", "optax"), "topology is numpy only"


def test_the_library_needs_jax_numpy_optax_and_jaxtyping_only():
    import sys

    found = {name.split(".")[0] for path in SOURCES for name in imports(path)}
    assert found <= LIBRARIES | {"crossover_jax"} | set(sys.stdlib_module_names)


def test_only_forms_sends_messages():
    senders = [p.name for p in SOURCES if "lax.ppermute(" in p.read_text()]
    assert senders == ["forms.py"]
