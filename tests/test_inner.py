"""Workers of several devices: whatever the sharding inside, the same mixing, and one model per worker on the wire."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from experiments.compiled import collectives, traffic
from tests.oracles import mixed_by_matrices

WORKERS = 4
SHAPES = {"big": (12, 8), "odd": (5,), "scale": (), "wide": (3, 16)}
INSIDE = {
    "data": {},
    "fsdp": {"big": P("a", None), "wide": P(None, "a")},
    "tensor": {"big": P(None, "b"), "wide": P(None, "b"), "odd": P()},
    "both": {"big": P("a", "b"), "wide": P(None, ("a", "b"))},
}


def mesh_of(kind=AxisType.Auto, inner=2):
    devices = np.asarray(jax.devices()[: WORKERS * 2 * inner]).reshape(WORKERS, 2, inner)
    return Mesh(devices, ("worker", "a", "b"), axis_types=(kind,) * 3)


def random_tree(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(WORKERS, *shape)).astype(dtype) for name, shape in SHAPES.items()}


def placed(tree, mesh, specs):
    return {k: jax.device_put(x, NamedSharding(mesh, P("worker", *specs.get(k, P())))) for k, x in tree.items()}


def lower(mix, mesh, specs):
    """The exchange alone on that mesh, the tree donated, and its compiled text."""
    shardings = {k: NamedSharding(mesh, P("worker", *specs.get(k, P()))) for k in SHAPES}

    def one(tree, step):
        mixed = mix(jax.tree.map(lambda x: x[0], tree), step)
        return jax.tree.map(lambda x: x[None], mixed)

    step = jax.shard_map(one, mesh=mesh, in_specs=(P("worker"), P()), out_specs=P("worker"), axis_names={"worker"})
    run = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return run, run.lower(placed(random_tree(), mesh, specs), jnp.int32(0)).compile().as_text()


POOLS = {
    "latin": lambda: cj.topology.latin(WORKERS, 3),
    "base": lambda: cj.topology.base(WORKERS, 2),
    "pull": lambda: cj.topology.pull(WORKERS, 3),
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("cut", ["whole", "by_module"])
def test_sharding_inside_a_worker_changes_nothing(inside, pool, cut):
    pool, mesh, specs, tree = POOLS[pool](), mesh_of(), INSIDE[inside], random_tree()
    one = jax.tree.map(lambda x: x[0], tree)
    cut = cj.whole() if cut == "whole" else cj.by_module(one, lambda name: name)
    table = cj.topology.sample(cut.num_segments, pool.num_rounds)
    every = {name: specs.get(name, P()) for name in SHAPES}
    run, _ = lower(cj.gossip(pool, cut, table, specs=every), mesh, specs)
    for step in (0, 3):
        got = run(placed(tree, mesh, specs), jnp.int32(step))
        expected = mixed_by_matrices(tree, step, pool, cut, table)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
        assert got["big"].sharding.is_equivalent_to(NamedSharding(mesh, P("worker", *specs.get("big", P()))), 3)
    assert run._cache_size() == 1


@pytest.mark.parametrize("cut", [cj.by_size(3), cj.by_rows(3, align=4)], ids=["by_size", "by_rows"])
def test_equal_cuts_are_of_each_devices_part(cut):
    """Elements belong to other segments than without sharding: to those of the device's own part."""
    mesh, pool = mesh_of(), cj.topology.latin(WORKERS, 3)
    table, specs = cj.topology.shuffle(3, 3), {"big": P("a", "b")}
    x = np.random.default_rng(0).normal(size=(WORKERS, 12, 8)).astype(np.float32)
    mix = cj.gossip(pool, cut, table, specs={"big": P("a", "b")})
    step = cj.per_worker(mix, mesh, replicated=(1,), out_specs=specs)
    got = step({"big": jax.device_put(x, NamedSharding(mesh, P("worker", "a", "b")))}, jnp.int32(2))
    for rows in (slice(0, 6), slice(6, 12)):
        for columns in (slice(0, 4), slice(4, 8)):
            part = {"big": np.ascontiguousarray(x[:, rows, columns])}
            expected = mixed_by_matrices(part, 2, pool, cut, table)
            np.testing.assert_allclose(got["big"][:, rows, columns], expected["big"], rtol=1e-5, atol=1e-6)


def sent_by_workers(text):
    """Bytes that leave each worker of four devices, from the permutes of a compiled program."""
    sent = np.zeros(WORKERS)
    for line in text.splitlines():
        if found := re.search(r"= f32\[(\d+)\].* collective-permute\(.*source_target_pairs=\{(.*?)\}\}", line):
            for pair in re.findall(r"(\d+),(\d+)", found.group(2)):
                source, target = (int(device) // 4 for device in pair)
                sent[source] += 4 * int(found.group(1)) * (source != target)
    return sent


@pytest.mark.parametrize("inside", INSIDE)
def test_one_worker_sends_one_model_whatever_is_inside_and_gathers_only_inside(inside):
    specs = {name: INSIDE[inside].get(name, P()) for name in SHAPES}
    mix = cj.gossip(cj.topology.latin(WORKERS, 3), cj.by_size(3), cj.topology.shuffle(3, 3), specs=specs)
    _, text = lower(mix, mesh_of(), INSIDE[inside])
    found = collectives(text)
    assert found["collective-permute"] == 3
    assert "conditional" not in found
    assert "all-reduce" not in found
    model = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    # At most 3 + 1 elements of padding per leaf that is split flat, and 2 per device to make three segments equal.
    padding = 4 * (3 * len(SHAPES) + 4 * 2)
    sent = sent_by_workers(text)
    assert (sent >= model).all()
    assert (sent <= model + padding).all()
    for row in traffic(text, mesh_of()):
        if row.operation == "collective-permute":
            assert row.axes == ("worker",)
            assert row.bytes_per_worker == sent.max()
            assert row.bytes_per_chip == sent.max() / 4
        else:  # gathered inside the worker only
            assert row.operation == "all-gather"
            assert "worker" not in row.axes
            assert row.bytes_per_worker == 0


def test_without_specs_a_worker_still_sends_one_model():
    _, text = lower(cj.gossip(cj.topology.latin(WORKERS, 3), cj.by_size(3), cj.topology.shuffle(3, 3)), mesh_of(), {})
    model = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert (sent_by_workers(text) <= model + 4 * (3 * len(SHAPES) + 8)).all()


def test_explicit_axes_carry_their_own_specs():
    mesh, specs, tree = mesh_of(AxisType.Explicit), {"big": P("a", "b"), "wide": P(None, "a")}, random_tree()
    pool, cut, table = cj.topology.latin(WORKERS, 3), cj.whole(), cj.topology.cycle(1, 3)
    run, text = lower(cj.gossip(pool, cut, table), mesh, specs)
    got = run(placed(tree, mesh, specs), jnp.int32(1))
    expected = mixed_by_matrices(tree, 1, pool, cut, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
    assert "all-reduce" not in collectives(text)


@pytest.mark.parametrize("inside", INSIDE)
def test_an_average_sends_each_part_once_whatever_the_sharding(inside):
    """2 (n - 1) / n models per worker, what a ring needs, and not that many from each of its devices."""
    mesh, specs, tree = mesh_of(), INSIDE[inside], random_tree()
    every = {name: specs.get(name, P()) for name in SHAPES}
    run, text = lower(cj.average(specs=every), mesh, specs)
    got = run(placed(tree, mesh, specs), jnp.int32(0))
    for name, x in tree.items():
        np.testing.assert_allclose(got[name], np.broadcast_to(x.mean(0), x.shape), rtol=1e-5, atol=1e-6)
    rows = [row for row in traffic(text, mesh) if "worker" in row.axes]
    assert {row.operation for row in rows} == {"all-reduce"}
    model = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    ring = 2 * (WORKERS - 1) / WORKERS
    assert ring * model <= sum(row.bytes_per_worker for row in rows) <= ring * (model + 4 * 3 * len(SHAPES))
