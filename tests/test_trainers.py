"""Public training programs, written anew as small ones of the same shape in trainers/, and how gossip changes each.

A line `# was:` holds what the line after it replaces, `# new` marks what was added (behind the line, or before it), and
`# gone:` what was taken out. So the program without gossip can be made again: it counts the lines, and it is the
oracle.
"""

import difflib
import functools
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import crossover_jax as cj
from tests.trainers.common import SAVE_EVERY, latest_step

FOLDER = pathlib.Path(__file__).parent / "trainers"
STEPS = 8


class Shape(NamedTuple):
    before: int  # lines that the public program needed when it was first changed by hand
    lines: int  # that the program in trainers/ needs
    params: Callable[[dict[str, Any]], Any]  # of all workers, in the names of the program
    atol: float  # how far one worker may be from the original, and a mesh from its simulation
    saves: bool = False
    axis: str = "worker"
    inner: dict[str, int] | None = None  # axes that the program names in its constraints


def of_state(names):
    return names["state"].params


def of_arrays(names):
    return names["arrays"]


def of_module(kind):
    return lambda names: nnx.state(names["state"][0], kind)


# Adam divides by what it has seen of a gradient: where that is nearly zero, as of adapters that begin at zero, rounding
# decides. So its bound is wider, and wider still where its momentum is kept in bfloat16. Parameters move by 0.08.
SGD, ADAM, ROUNDED = 1e-5, 1e-4, 2e-3
SHAPES = {
    "big_vision": Shape(9, 6, lambda names: names["state"]["params"], ROUNDED, saves=True, inner={"data": 1}),
    "cookbook_lbfgs": Shape(5, 5, of_module(nnx.Param), SGD),
    "cookbook_lora": Shape(5, 5, of_module(nnx.LoRAParam), ROUNDED),
    "equinox_mnist": Shape(11, 6, of_arrays, ADAM),
    "equinox_parallelism": Shape(13, 8, of_arrays, ADAM),
    "equinox_stateful": Shape(11, 7, of_arrays, ADAM),
    "flax_mnist": Shape(10, 5, of_module(nnx.Param), SGD),
    "gemma": Shape(10, 5, of_state, ADAM),
    "haiku_mnist": Shape(7, 7, of_state, ADAM),
    "imagenet": Shape(12, 6, of_state, SGD, saves=True, axis="batch"),
    "lm1b": Shape(14, 7, of_state, ADAM, saves=True),
    "lookahead": Shape(8, 6, lambda names: names["params"].fast, ADAM),
    "nanodo": Shape(16, 8, of_state, ADAM, saves=True, inner={"data": 1}),
    "nanogpt": Shape(7, 5, of_state, ADAM, saves=True),
    "nnx_toy": Shape(10, 5, of_module(nnx.Param), ADAM),
    "purejaxrl": Shape(5, 5, of_state, ADAM),
}
# More than half of the lines that it once took. Six must be there: the import, the optimizer, copies, the step of all
# workers, the parts of the batch, the average; five where two of them meet in one line. Haiku and two of Equinox have
# a seventh, because they pass no parameters to the optimizer; one of Equinox returns shardings, which is an eighth.
MORE_THAN_HALF = {
    "big_vision",
    "cookbook_lbfgs",
    "cookbook_lora",
    "equinox_mnist",
    "equinox_parallelism",
    "equinox_stateful",
    "haiku_mnist",
    "lookahead",
    "nanogpt",
    "purejaxrl",
}
# What these show others show too, in less time.
SLOW = {"big_vision", "cookbook_lbfgs", "cookbook_lora", "equinox_parallelism", "gemma", "nanogpt"}


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


every_shape = pytest.mark.parametrize("name", marked(SHAPES))


def source_of(name):
    return (FOLDER / f"{name}.py").read_text()


def gossip_of(name):
    """The program without its marks."""
    source = re.sub(r"^ *# (was|gone|new\b).*\n", "", source_of(name), flags=re.MULTILINE)
    return re.sub(r"  # new$", "", source, flags=re.MULTILINE)


def original_of(name):
    """The program before gossip."""
    lines, skips = [], False
    for line in source_of(name).splitlines():
        mark = re.match(r"( *)# (was|gone|new\b):? ?(.*)", line)
        if mark:
            indent, kind, text = mark.groups()
            lines += [indent + text] if kind != "new" else []
            skips = kind != "gone"
        elif not (skips or line.endswith("  # new")):
            lines.append(line)
        else:
            skips = False
    return "\n".join(lines) + "\n"


def code(source):
    return [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]


@pytest.fixture(scope="module")
def compiled():
    """A list that grows by one with each program that XLA compiles."""
    events = []

    def listen(event, duration_secs, **_):
        if event.endswith("backend_compile_duration"):
            events.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def run(compiled):
    def run(source, name, n, workers, folder=None):
        """What the program has made. It runs in the names that the tests set, instead of its own."""
        source, count = re.subn(r"^n, workers, steps.*$", "", source, flags=re.MULTILINE)
        assert count == 1
        names = {"__name__": f"trainers.{name}", "n": n, "workers": workers, "steps": STEPS, "folder": folder}
        copied, compiles = [], []

        def copies(*args, **options):
            copied.append(library_copies(*args, **options))
            return copied[-1]

        def per_worker(*args, **options):
            step = library_per_worker(*args, **options)

            def counted(*args):
                before = len(compiled)
                result = step(*args)
                compiles.append(len(compiled) - before)
                return result

            return counted

        library_copies, library_per_worker = cj.copies, cj.per_worker
        with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"):  # as users have it
            patch.setattr(cj, "copies", copies)
            patch.setattr(cj, "per_worker", per_worker)
            exec(compile(source, f"tests/trainers/{name}.py", "exec"), names)
        return names | {"copied": copied, "compiles": compiles}

    return run


def mesh_of(name, n=8, inner=None):
    inner = inner or SHAPES[name].inner
    devices = jax.devices()[: n * np.prod([*(inner or {}).values()], dtype=int)]
    return cj.make_mesh(n, inner, devices=devices, axis=SHAPES[name].axis)


@pytest.fixture(scope="module")
def ran(run, tmp_path_factory):
    """Each program in each way, once."""

    @functools.cache
    def ran(name, way):
        if way == "original":
            return run(original_of(name), name, 1, None)
        n = 1 if way == "one" else 8
        folder = tmp_path_factory.mktemp(name) if SHAPES[name].saves and way == "mesh" else None
        with pytest.MonkeyPatch.context() as patch:
            if way == "alone":
                patch.setattr(cj, "crossover_sgd", lambda optimizer, n: cj.mix_after(optimizer, cj.chain()))
            return run(gossip_of(name), name, n, mesh_of(name) if way == "mesh" else n, folder)

    return ran


def arrays(tree):
    """The arrays of a tree as numpy has them, random keys as their bits."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)]
    typed = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [np.asarray(jax.random.key_data(x) if key else x) for x, key in zip(leaves, typed, strict=True)]


def assert_close(found, expected, **tolerance):
    assert arrays(expected)
    for a, b in zip(arrays(found), arrays(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_every_program_is_in_the_table():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"common", "conftest"} == set(SHAPES)


def test_the_start_page_says_how_many_lines_each_needs():
    page = (FOLDER.parents[1] / "docs" / "start.md").read_text()
    said = dict(re.findall(r"^\| \[`(\w+)`\]\(\.\./tests/trainers/.*\| (\d+) \|$", page, re.MULTILINE))
    assert said == {name: str(shape.lines) for name, shape in SHAPES.items() if name in said}
    assert len(said) == 15  # all but L-BFGS


@pytest.mark.parametrize("name", SHAPES)
def test_lines_that_gossip_adds_or_changes(name):
    original, gossip = code(original_of(name)), code(gossip_of(name))
    assert not any("cj." in line or "crossover" in line for line in original)
    added = [line for line in difflib.ndiff(original, gossip) if line.startswith("+ ")]
    assert len(added) == SHAPES[name].lines, "\n".join(added)
    assert (2 * len(added) > SHAPES[name].before) == (name in MORE_THAN_HALF)


@every_shape
def test_workers_exchange(name, ran):
    together, alone = (cj.consensus_distance(SHAPES[name].params(ran(name, way))) for way in ("simulated", "alone"))
    assert together < 0.5 * alone


@every_shape
def test_one_worker_is_the_original(name, ran):
    assert_close(ran(name, "one")["model"], ran(name, "original")["model"], rtol=0, atol=SHAPES[name].atol)


@every_shape
def test_a_mesh_and_simulated_agree(name, ran):
    found, expected = (SHAPES[name].params(ran(name, way)) for way in ("mesh", "simulated"))
    assert_close(found, expected, rtol=0, atol=SHAPES[name].atol)


@every_shape
@pytest.mark.parametrize("way", ["mesh", "simulated"])
def test_the_step_compiles_once_and_takes_the_memory_of_the_state(name, way, ran):
    """That a donation was of no use would be a warning, and warnings are errors."""
    names = ran(name, way)
    assert names["compiles"] == [1, *[0] * (len(names["compiles"]) - 1)]
    for copied in names["copied"]:
        assert all(x.is_deleted() for x in jax.tree.leaves(copied) if jnp.issubdtype(x.dtype, jnp.inexact))


@every_shape
@pytest.mark.parametrize("way", ["mesh", "simulated"])
def test_the_averaged_model_is_better_than_the_first_one(name, way, ran):
    names = ran(name, way)
    assert names["after"] < 0.95 * names["before"]


@pytest.mark.parametrize("name", marked(name for name, shape in SHAPES.items() if shape.saves))
def test_a_checkpoint_of_all_workers_goes_on_bit_for_bit(name, ran, run):
    whole = ran(name, "mesh")
    assert latest_step(whole["folder"]) == STEPS
    shutil.rmtree(whole["folder"] / str(STEPS))
    assert latest_step(whole["folder"]) == SAVE_EVERY
    resumed = run(gossip_of(name), name, 8, mesh_of(name), whole["folder"])
    assert len(resumed["compiles"]) == len(whole["compiles"]) * SAVE_EVERY // STEPS
    for a, b in zip(arrays(resumed["state"]), arrays(whole["state"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed["compiles"] == [1, *[0] * (len(resumed["compiles"]) - 1)]


def test_nanodo_with_workers_of_two_devices(run, monkeypatch):
    """Of the whole model in one piece: each device sends its half, so in other cuts other elements travel together."""
    crossover_sgd = cj.crossover_sgd
    monkeypatch.setattr(cj, "crossover_sgd", lambda optimizer, n: crossover_sgd(optimizer, n, cut=cj.whole()))
    shape, gossip = SHAPES["nanodo"], gossip_of("nanodo")
    found, expected = (run(gossip, "nanodo", 4, workers) for workers in (mesh_of("nanodo", 4, {"data": 2}), 4))
    assert_close(shape.params(found), shape.params(expected), rtol=0, atol=shape.atol)
    assert found["compiles"] == [1, *[0] * (len(found["compiles"]) - 1)]
