"""Slices of a mesh as workers: gossip on two levels, inside a slice and more rarely between slices, and even loads."""

import collections
import functools
import inspect
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax.topology.spectral import messages
from experiments.compiled import collectives, schedule, traffic
from tests.oracles import mixed_by_matrices

SLOW, FAST, EVERY = 3, 4, 2
SHAPES = {"body": (6, 4), "bias": (8,), "head": (4, 2)}
LEVELS = P("slow", "fast")


def levels(form, slow=SLOW, fast=FAST):
    """Pool, table and cut inside the groups, and between them: over channels, or by a switch per leaf."""
    if form == "channels":
        return [(cj.topology.latin(n, 2), cj.by_size(4), cj.topology.shuffle(4, 2, seed=n + 2)) for n in (fast, slow)]
    cut = cj.by_module({name: np.zeros(shape) for name, shape in SHAPES.items()}, lambda name: name)
    pools = cj.topology.pull(fast, 2), cj.topology.base(slow)  # shares that differ between workers
    return [(pool, cut, cj.topology.sample(cut.num_segments, pool.num_rounds)) for pool in pools]


def on_two_levels(inside, between, slow="slow"):
    return cj.chain(cj.gossip(*inside, "fast"), cj.every(EVERY, cj.gossip(*between, slow)))


def mesh_of(*sizes):
    devices = np.asarray(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    return Mesh(devices, ("slow", "fast", "device")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def simulated(mix):
    for axis in ("fast", "slow"):
        mix = jax.vmap(mix, in_axes=(0, None), axis_name=axis)
    return jax.jit(mix)


def on_mesh(mix, mesh, levels=LEVELS):
    def of_one(tree, step):
        mixed = mix(jax.tree.map(lambda x: x[0, 0], tree), step)
        return jax.tree.map(lambda x: x[None, None], mixed)

    run = jax.shard_map(of_one, mesh=mesh, in_specs=(levels, P()), out_specs=levels, axis_names=set(levels))
    return jax.jit(run, out_shardings=NamedSharding(mesh, levels))


def mixed_on_two_levels(tree, step, inside, between):
    """kron(I, W inside) at every step, after each EVERY steps kron(W between, I); leaves `[SLOW * FAST, ...]`."""
    (fast, *how), (slow, *how_between) = inside, between
    all_inside = SimpleNamespace(matrix=lambda p: np.kron(np.eye(SLOW), fast.matrix(p)))
    all_between = SimpleNamespace(matrix=lambda p: np.kron(slow.matrix(p), np.eye(FAST)))
    tree = mixed_by_matrices(tree, step, all_inside, *how)
    return mixed_by_matrices(tree, step // EVERY, all_between, *how_between) if step % EVERY == EVERY - 1 else tree


@pytest.mark.parametrize("form", ["channels", "switch"])
@pytest.mark.parametrize("place", ["simulated", (SLOW, FAST), (SLOW, FAST, 2)], ids=str)
def test_gossip_on_two_levels_is_the_product_of_their_matrices(place, form):
    both = levels(form)
    mix = on_two_levels(*both)
    run = simulated(mix) if place == "simulated" else on_mesh(mix, mesh_of(*place))
    devices = 2 if len(place) == 3 else 1  # of a worker: each mixes its half of every leaf
    rng = np.random.default_rng(0)
    parts = [
        {k: rng.normal(size=(SLOW * FAST, np.prod(s) // devices)) for k, s in SHAPES.items()} for _ in range(devices)
    ]
    joined = lambda parts: {k: np.stack([p[k] for p in parts], 1).reshape(SLOW, FAST, *SHAPES[k]) for k in SHAPES}
    with jax.enable_x64(True):
        tree = joined(parts)
        for step in range(2 * EVERY + 1):
            tree = run(tree, jnp.int32(step))
            parts = [mixed_on_two_levels(part, step, *both) for part in parts]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), tree, joined(parts))


@pytest.mark.parametrize("form", ["channels", "switch"])
def test_each_level_sends_one_model_along_its_own_axis(form):
    mesh, (inside, between) = mesh_of(SLOW, FAST, 2), levels(form)
    shapes = {k: jax.ShapeDtypeStruct((SLOW, FAST, *s), jnp.float32) for k, s in SHAPES.items()}
    model = 4 * sum(np.prod(s) for s in SHAPES.values())

    def sent(mix):
        text = on_mesh(mix, mesh).lower(shapes, jnp.int32(0)).compile().as_text()
        rows = traffic(text, mesh, "slow")
        assert {row.axes for row in rows if row.operation != "collective-permute"} == {("device",)}
        return {row.axes: 2 * row.bytes_per_chip for row in rows if row.operation == "collective-permute"}

    alone = sent(cj.gossip(*inside, "fast")), sent(cj.gossip(*between, "slow"))
    assert [set(level) for level in alone] == [{("fast",)}, {("slow",)}]
    assert sent(on_two_levels(inside, between)) == alone[0] | alone[1]
    if form == "channels":  # of a switch all branches are counted
        assert [*alone[0].values(), *alone[1].values()] == [model, model]


PODS = {"v5e:2x4": 4, "v5p:2x2x2": 2, "v5e:16x16": 1}


@functools.cache
def pod(name):
    """The chips of a pod that is not here, slice by slice and host by host."""
    slices = {"num_slices": PODS[name]} if PODS[name] > 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices
    return cj.make_mesh(len(devices), devices=devices).devices.tolist()


def shapes_on(mesh, tree, spec):
    sizes = tuple(mesh.shape[axis] for axis in spec)
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((*sizes, s), jnp.float32, sharding=sharding), tree)


@pytest.mark.full_compilation
@pytest.mark.parametrize("inner", [{}, {"device": 2}], ids=str)
def test_on_a_pod_only_the_rare_exchange_leaves_a_slice(inner):
    """Groups are slices: what runs at every step stays on ICI, and the DCN is used behind the one conditional."""
    fast = 4 if inner else 8
    mesh = cj.make_mesh(4, {"fast": fast, **inner}, devices=pod("v5e:2x4"))
    mix, spec = on_two_levels(*levels("channels", 4, fast), slow="worker"), P("worker", "fast")
    shapes, number = shapes_on(mesh, {"w": 2**15}, spec), NamedSharding(mesh, P())
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=number)
    text = on_mesh(mix, mesh, spec).lower(shapes, step).compile().as_text()
    crossing = {(row.operation, row.axes) for row in traffic(text, mesh) if row.link == "DCN"}
    staying = {(row.operation, row.axes) for row in traffic(text, mesh) if row.link == "ICI"}
    assert crossing == {("send", ("worker",))}
    assert staying == {("collective-permute", ("fast",))} | ({("all-gather", ("device",))} if inner else set())
    always = collections.Counter(operation.removesuffix("-start") for operation in schedule(text))
    assert collectives(text)["send"] == 2
    assert always["send"] == 0
    assert always["conditional"] == collectives(text)["conditional"] == 1
    assert always["collective-permute"] == collectives(text)["collective-permute"] == 2
    usual = on_mesh(lambda tree, step: mix(tree, 0), mesh, spec).lower(shapes, step).compile().as_text()
    assert not [row for row in traffic(usual, mesh) if row.link == "DCN"]


POOLS = {"latin": lambda n: cj.topology.latin(n, 8), "exponential": cj.topology.exponential, "ring": cj.topology.ring}


def pairs_by_size(text, devices):
    """Every message (source, target) of a compiled program by its number of elements; workers by their place.

    The text is what one slice runs: permutes are numbered inside the slice, and stand for all slices or, in a branch
    of a conditional, for the slice of that number. What crosses slices is a `send` with all its pairs.
    """
    place = {device.id: i for i, device in enumerate(devices)}
    slices = len(set(map(slice_of, devices)))
    branches = re.findall(r"branch_computations=\{(.*?)\}", text)
    only = {name: k for names in branches for k, name in enumerate(names.split(", "))}
    pairs, computation = collections.defaultdict(list), ""
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?(%[\w.\-]+) \(", line):
            computation = found[1]
        elif found := re.search(r"= \(?f32\[(\d+)\].* send\(.*_xla_megascale_target=\{(.*?)\}\}", line):
            ids = re.findall(r"(\d+)->(\d+)", found[2])
            pairs[int(found[1])] += [(place[int(s)], place[int(t)]) for s, t in ids]
        elif found := re.search(r"= \(?f32\[(\d+)\].* collective-permute(?:-start)?\(.*target_pairs=\{(.*?)\}\}", line):
            ids = np.asarray(re.findall(r"(\d+),(\d+)", found[2]), int)
            for k in [only[computation]] if computation in only else range(slices):
                pairs[int(found[1])] += map(tuple, (ids + k * len(devices) // slices).tolist())
    return [[(s, t) for s, t in pairs[size] if s != t] for size in sorted(pairs)]


def slice_of(device):
    return getattr(device, "slice_index", 0)


def host_of(device):
    return slice_of(device), device.process_index


def leaving(pairs, groups):
    """Messages that leave each group, of pairs (source, target) of its members."""
    found = collections.Counter(groups[s] for s, t in pairs if groups[s] != groups[t])
    return [found[group] for group in sorted(set(groups))]


def pairs_of(pool, p):
    return sorted((j, i) for row in pool.receive_from[p].tolist() for i, j in enumerate(row) if i != j)


def compiled_rounds(pool, devices):
    """The text of one program with all rounds of a pool, round p with a message of p + 1 times 1024 elements."""
    mesh, rounds = cj.make_mesh(len(devices), devices=devices), range(pool.num_rounds)
    tree = {f"{p:02}": 1024 * (p + 1) for p in rounds}
    cut = cj.by_module({name: np.zeros(1) for name in tree}, lambda name: name)
    mix = cj.gossip(pool, cut, np.asarray([rounds]))
    return cj.per_worker(lambda tree: mix(tree, 0), mesh).lower(shapes_on(mesh, tree, P("worker"))).compile().as_text()


@pytest.mark.parametrize("name", PODS)
@pytest.mark.parametrize("pool", POOLS)
def test_in_every_round_every_host_and_every_slice_sends_equally_many_messages(pool, name):
    devices = pod(name)
    pool, hosts, slices = POOLS[pool](len(devices)), list(map(host_of, devices)), list(map(slice_of, devices))
    text = compiled_rounds(pool, devices)
    rounds, promised = pairs_by_size(text, devices), messages(pool, len(set(hosts)), len(set(slices)))
    assert collectives(text)["conditional"] == 0
    assert len(rounds) == pool.num_rounds
    for p, pairs in enumerate(rounds):
        assert sorted(pairs) == pairs_of(pool, p)
        assert leaving(pairs, hosts) == promised.host[p].tolist()
        assert leaving(pairs, slices) == promised.slice[p].tolist()
        assert len(set(leaving(pairs, hosts))) == len(set(leaving(pairs, slices))) == 1


@pytest.mark.parametrize("name", PODS)
def test_derangements_load_hosts_and_slices_unevenly_and_need_conditionals_between_slices(name):
    devices = pod(name)
    pool = cj.topology.derangements(len(devices), 4)
    text = compiled_rounds(pool, devices)
    rounds = pairs_by_size(text, devices)
    assert [sorted(pairs) for pairs in rounds] == [pairs_of(pool, p) for p in range(4)]
    assert any(len(set(leaving(pairs, list(map(host_of, devices))))) > 1 for pairs in rounds)
    # Of two slices each sends the other as much as it receives.
    assert any(len(set(leaving(pairs, list(map(slice_of, devices))))) > 1 for pairs in rounds) == (PODS[name] > 2)
    assert collectives(text)["conditional"] == (4 if PODS[name] > 1 else 0)


@pytest.mark.parametrize("name", PODS)
def test_crossover_sgd_as_recommended_loads_hosts_and_slices_evenly_without_a_conditional(name):
    devices = pod(name)
    n, mesh = len(devices), cj.make_mesh(len(devices), devices=devices)
    algorithm = cj.crossover_sgd(optax.sgd(0.1), n)
    step = cj.per_worker(lambda x, t: algorithm.update(x, algorithm.init(x), x, t)[0], mesh, replicated=(1,))
    t = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    text = step.lower(shapes_on(mesh, 2**18, P("worker")), t).compile().as_text()
    (pairs,) = pairs_by_size(text, devices)  # segments are equal, so all rounds together
    pool = cj.topology.latin(n, len(pairs) // n)
    assert collectives(text)["conditional"] == 0
    assert pool.num_rounds == max(8, 2 * np.log2(n))
    assert sorted(pairs) == sorted(pair for p in range(pool.num_rounds) for pair in pairs_of(pool, p))
    assert len(set(leaving(pairs, list(map(host_of, devices))))) == 1
    assert len(set(leaving(pairs, list(map(slice_of, devices))))) == 1


def test_a_step_that_differs_along_the_other_axis_is_refused_and_so_is_a_pair_of_axes():
    """Half the devices would enter the conditional, and wait in it for the others."""
    mesh = mesh_of(2, 4)
    between = cj.every(2, cj.gossip(cj.topology.latin(2, 1), cj.whole(), cj.topology.cycle(1, 1), "slow"))

    def run(mix):
        step = lambda x, t: mix(x, t + jax.lax.axis_index("fast"))
        return jax.shard_map(step, mesh=mesh, in_specs=(LEVELS, P()), out_specs=LEVELS)(jnp.zeros((2, 4)), jnp.int32(0))

    with pytest.raises(ValueError, match="must be the same on all workers, but it varies over axis 'fast'"):
        run(between)
    with pytest.raises(ValueError, match=r"`axis` must be one name, got \('slow', 'fast'\)"):
        run(inspect.unwrap(cj.average)(("slow", "fast")))  # past the type checker, which users do not have
