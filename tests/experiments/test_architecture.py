"""The rooms of the experiments, read from the imports: no circle, and what lies below does not know what lies above."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = {"train", "preflight", "export", "sweep", "figures", "report_page", "trials"}
BELOW = {  # what of the experiments these rooms may import, beside themselves
    "paths": set(),
    "csv_rows": set(),
    "svg": set(),
    "mixing_pattern": {"algorithms"},
    "processes": set(),
    "models": set(),
    "configs.default": set(),
    "data": {"paths"},
    "optimizers": {"configs"},  # in its docstring
    "others": set(),
    "algorithms": {"models", "others"},
    "checksums": set(),
    "workdir": {"paths", "processes"},
    "step": {"optimizers", "processes"},
    "settings": {"algorithms", "configs.default", "data", "models", "optimizers", "processes"},
}


def modules():
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text())


def imports(tree, names):
    """The modules of ours that a module imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in names else node.module


TREES = dict(modules())
GRAPH = {name: set(imports(tree, TREES)) - {name} for name, tree in TREES.items()}


def test_no_module_imports_itself_by_way_of_others():
    left = {name: set(below) for name, below in GRAPH.items()}
    for name, below in left.items():  # a package's own modules are no arrow back to it
        below -= {other for other in below if name.startswith(f"{other}.") or other.startswith(f"{name}.")}
    while free := {name for name, below in left.items() if not below & left.keys()}:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_what_lies_below_it_only(room):
    for name in (name for name in GRAPH if f"{name}.".startswith(f"experiments.{room}.")):
        for other in GRAPH[name]:
            below = {room, *BELOW[room]}
            allowed = any(f"{other}.".startswith(f"experiments.{own}.") for own in below)
            assert allowed or other == "experiments", f"{name} imports {other}"


def test_commands_are_imported_by_commands_only():
    for name, below in GRAPH.items():
        for other in below:
            if other.split(".")[1:2] and other.split(".")[1] in COMMANDS:
                assert name.split(".")[1] in COMMANDS, f"{name} imports {other}"
