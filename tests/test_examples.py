"""The examples, for a few steps: gossip does what it says, and the program that it was added to is the oracle.

Lines that end in `# new` were added to a program for one device, and behind `# was:` stands what a line replaces. So
the original can be made again, and must be what one worker computes.
"""

import functools
import io
import pathlib
import re
from contextlib import redirect_stdout

import jax
import numpy as np
import pytest

from crossover_jax import islands, mixing

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = [path.stem for path in sorted((ROOT / "examples").glob("*.py"))]
STEPS = {"islands": 150}  # else 4: what goes on in the background takes time
ALONE = {  # what else must change for the one worker that is plain optax
    "outer_steps": ("outer_optimizer = .*", "outer_optimizer = None  # new"),  # else the one worker takes outer steps
    "own_topology": ("pool = .*", "pool = Pool.from_peers(np.zeros((1, 1, 1), int), 0.5)  # new"),
}
every_example = pytest.mark.parametrize("name", NAMES)


def source_of(name):
    """For a few steps. The devices are those of the tests."""
    source = (ROOT / "examples" / f"{name}.py").read_text()
    source = re.sub(r"^jax\.config\.update\(\"jax_num_cpu_devices\".*\n", "", source, flags=re.MULTILINE)
    source = re.sub(r"^length = 16", "length = 2", source, flags=re.MULTILINE)
    source = source.replace("layers = 32, 64, 2", "layers = 32, 64, 1")  # most of the time is its compilation
    source, count = re.subn(
        r"^(\w+, steps = .*), \d+(?=$|  #)", rf"\1, {STEPS.get(name, 4)}", source, flags=re.MULTILINE
    )
    assert count == 1
    return source


def with_one_worker(name):
    source = re.sub(r"^(\w+, steps =) (\(2, 4\)|\d+)", alone, source_of(name), flags=re.MULTILINE)
    if name in ALONE:
        source, count = re.subn(*ALONE[name], source)
        assert count == 1
    return source


def alone(match):
    return f"{match[1]} {'(1, 1)' if '(' in match[2] else 1}"


def original_of(name):
    """The program before gossip."""
    lines = []
    for line in source_of(name).splitlines():
        _, was, replaced = line.partition("# was: ")
        if was:
            lines.append(line[: len(line) - len(line.lstrip())] + replaced)
        elif not line.endswith("# new"):
            lines.append(line)
    return "\n".join(lines)


def run(source, name):
    """What the program has made, and what it printed."""
    namespace, printed = {"__name__": "__main__"}, io.StringIO()
    with redirect_stdout(printed), jax.numpy_rank_promotion("allow"):  # as users have it
        exec(compile(source, f"examples/{name}.py", "exec"), namespace)
    return namespace, printed.getvalue()


@functools.cache
def ran(name):
    return run(source_of(name), name)


def apart(printed):
    return float(re.search(r"^workers are ([\d.]+) apart$", printed, re.MULTILINE)[1])


@every_example
def test_it_is_short_and_ends_in_a_number(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
    assert len(lines) < 100
    assert sum(line.endswith("# new") or "# was: " in line for line in lines) <= 15
    assert re.fullmatch(r"[a-z ]+ \d+\.\d+", ran(name)[1].splitlines()[-1])


@every_example
def test_the_step_compiles_once(name):
    assert ran(name)[0]["step"]._cache_size() == 1


@every_example
def test_workers_exchange(name, monkeypatch):
    """Beside the same program in which every exchange gives back what it was given."""
    for form in ("channels", "index", "switch"):
        monkeypatch.setattr(mixing, f"exchange_by_{form}", lambda arrays, *args: arrays)
    exchange = islands.Island.exchange
    monkeypatch.setattr(
        islands.Island, "exchange", lambda self, params, state: exchange(self, params, state) and params
    )
    assert apart(ran(name)[1]) < 0.8 * apart(run(source_of(name), name)[1])


@every_example
def test_one_worker_is_the_program_without_gossip(name):
    original = original_of(name)
    one, printed = run(with_one_worker(name), name)
    expected, also = run(original, name)
    assert "cj" not in expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one["model"], expected["model"])
    assert float(printed.split()[-1]) == pytest.approx(float(also.split()[-1]), abs=1e-3)


def test_the_table_of_the_start_page_names_all_examples():
    page = (ROOT / "docs" / "start.md").read_text()
    assert sorted(re.findall(r"^\| \[`(\w+)\.py`\]\(\.\./examples/\1\.py\)", page, re.MULTILINE)) == NAMES
