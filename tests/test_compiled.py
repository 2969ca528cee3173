"""What the compiler makes of an exchange, ahead of time for TPU pods that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from experiments.compiled import collectives, in_flight, schedule, traffic

pytestmark = pytest.mark.full_compilation
SLICES, LAYERS, WIDTH = 4, 3, 1024
POOLS = {
    "latin": lambda n: cj.topology.latin(n, 8),
    "latin4": lambda n: cj.topology.latin(n, 4),
    "latin5": lambda n: cj.topology.latin(n, 5),  # within a slice libtpu has five permutes in flight
    "exponential": cj.topology.exponential,
    "ring": lambda n: cj.topology.ring(n),
    "symmetric": lambda n: cj.topology.symmetric(n, 4, slices=SLICES),
    "derangements": lambda n: cj.topology.derangements(n, 4),
}


@functools.cache
def chips(slices):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=slices).devices
    return sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.id))


def loss(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


@functools.cache  # several tests read the same programs
def compiled_step(name, slices, *, during, in_flight=None, cut=cj.by_size):
    """The text of the compiled train step of a stack of matrices on one worker per chip."""
    pool = POOLS[name](len(chips(slices)))
    mix = cj.crossover(pool.num_workers, pool=pool, cut=cut(pool.num_rounds), in_flight=in_flight)
    return compiled((cj.mix_during if during else cj.mix_after)(optax.sgd(0.1, momentum=0.9), mix), slices)


def compiled(algorithm, slices, length=None):
    """The same of any algorithm: one step, or a period of `length`."""
    devices = chips(slices)
    n = len(devices)
    mesh = cj.make_mesh(n, devices=devices)

    def step(state, x, t):
        params, inner = state
        return algorithm.update(jax.grad(loss)(params, x), inner, params, t), None

    params = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS
    x = jax.ShapeDtypeStruct((*(() if length is None else (length,)), 64, WIDTH), jnp.float32)
    shapes = ((params, jax.eval_shape(algorithm.init, params)), x)
    spec = NamedSharding(mesh, P("worker"))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct((n, *s.shape), s.dtype, sharding=spec), shapes)
    t = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    whole = step if length is None else cj.period(step, length)
    return cj.per_worker(whole, mesh, replicated=(2,)).lower(*shapes, t).compile().as_text()


# What these two compile to does not hang on when it runs: shown for the three others.
AGAIN = [pytest.param(name, True, marks=pytest.mark.slow) for name in ("symmetric", "derangements")]


@pytest.mark.parametrize(
    ("name", "during"),
    [
        *((name, False) for name in ("latin", "exponential", "ring", "symmetric", "derangements")),
        *((name, True) for name in ("latin", "exponential", "ring")),
        *AGAIN,
    ],
)
def test_pools_alike_in_every_slice_compile_for_four_slices_without_a_conditional(name, during):
    found = collectives(compiled_step(name, SLICES, during=during))
    assert (found.pop("conditional", 0) > 0) == (name == "derangements")
    assert found.pop("send", 0) > 0
    found.pop("collective-permute", 0)  # pairs inside a slice
    assert not found


@pytest.mark.parametrize(
    ("name", "slices", "options"),
    [
        ("latin5", 1, {}),  # the sixth follows the first
        ("latin4", 1, {"cut": cj.by_rows}),
        ("exponential", 1, {}),
        ("latin", 4, {}),
        ("latin", 4, {"cut": cj.by_rows}),
        ("exponential", 4, {}),
        ("ring", 4, {}),
        ("latin", 8, {}),
    ],
)
def test_mixing_during_the_step_sends_before_the_first_matmul_and_is_done_after_the_last(name, slices, options):
    order = schedule(compiled_step(name, slices, during=True, **options))
    matmuls = [i for i, op in enumerate(order) if op == "matmul"]
    starts = [i for i, op in enumerate(order) if op in ("send", "recv", "collective-permute-start")]
    dones = [i for i, op in enumerate(order) if op in ("send-done", "recv-done", "collective-permute-done")]
    assert len(matmuls) >= 3 * LAYERS - 1
    assert starts
    assert len(starts) == len(dones)
    assert ("send" in order) == (slices > 1)
    assert max(starts) < matmuls[0]
    assert min(dones) > matmuls[-1]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_no_more_channels_are_under_way_than_in_flight_allows(in_flight):
    order = schedule(compiled_step("latin5", 1, during=True, in_flight=in_flight))
    steps = {"collective-permute-start": 1, "collective-permute-done": -1}
    under_way = np.cumsum([steps.get(op, 0) for op in order])
    assert under_way.max() == in_flight
    assert sum(op == "collective-permute-start" for op in order) == 5


def test_mixing_after_the_step_cannot_be_hidden_and_the_schedule_shows_it():
    order = schedule(compiled_step("latin", SLICES, during=False))
    assert order.index("send") > max(i for i, op in enumerate(order) if op == "matmul")


@pytest.mark.parametrize(("slices", "wire"), [(1, None), (4, "int4"), pytest.param(4, None, marks=pytest.mark.slow)])
def test_an_exchange_stays_under_way_across_the_loop_over_a_period_s_steps(slices, wire):
    n = len(chips(slices))
    mix = cj.crossover(n, pool=POOLS["latin4"](n), wire=wire)
    outer = cj.outer(optax.sgd(0.1), optax.sgd(0.7, momentum=0.9, nesterov=True), mix, every=8, overlap=True)
    text = compiled(outer, slices, length=8)
    order = schedule(text)
    loop = order.index("while")
    matmuls = [i for i, op in enumerate(order) if op == "matmul"]  # of the last step, which stands on its own
    starts = [i for i, op in enumerate(order) if op in ("send", "recv", "collective-permute-start")]
    dones = [i for i, op in enumerate(order) if op in ("send-done", "recv-done", "collective-permute-done")]
    assert order.count("while") == 1
    assert len(matmuls) >= 3 * LAYERS - 1
    assert len(starts) == len(dones) >= 4
    assert ("send" in order) == (slices > 1)
    assert max(starts) < loop < matmuls[-1] < min(dones)
    assert "conditional" not in collectives(text)
    if wire is None:  # a model leaves; one arrives, by each link that a channel has: inside the slice, between slices
        slice_of = np.arange(n) // (n // slices)
        here = slice_of[POOLS["latin4"](n).receive_from[:, 0]] == slice_of
        links = here.any(1).sum() + (~here).any(1).sum()
        assert in_flight(text) == 4 * LAYERS * WIDTH**2 * (1 + links / 4)


def test_without_overlap_the_exchange_of_a_period_follows_its_loop():
    n = len(chips(SLICES))
    outer = cj.outer(optax.sgd(0.1), None, cj.crossover(n, pool=POOLS["latin4"](n)), every=4)
    text = compiled(outer, SLICES, length=4)
    order = schedule(text)
    assert order.index("while") < order.index("send")
    assert in_flight(text) == 0


@pytest.mark.parametrize("hierarchical", [False, True])
def test_the_traffic_of_a_pod_is_one_model_per_worker_over_dcn(hierarchical):
    pod = chips(SLICES)
    n = SLICES if hierarchical else len(pod)
    mesh = cj.make_mesh(n, {"device": len(pod) // n}, devices=pod)
    mix = cj.gossip(cj.topology.latin(n, 3), cj.by_size(3), cj.topology.shuffle(3, 3))
    x = jax.ShapeDtypeStruct((n, 1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P("worker")))
    t = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    text = cj.per_worker(mix, mesh, replicated=(1,)).lower(x, t).compile().as_text()
    rows = {(row.operation, row.link): row for row in traffic(text, mesh)}
    model = 4 * 2**20
    crossing = rows["send", "DCN"]
    assert crossing.axes == ("worker",)
    assert crossing.count == 3
    if hierarchical:  # each chip sends its eighth of the model, gathered again inside the slice
        assert model <= crossing.bytes_per_worker <= 1.01 * model
        assert crossing.bytes_per_chip == crossing.bytes_per_worker / 8
        assert rows["all-gather", "ICI"] == ("all-gather", ("device",), "ICI", 1, 7 / 8 * model, 0)
    else:  # a worker is a chip: what stays in its slice and what leaves it is one model together, at most
        assert crossing.bytes_per_worker <= 1.01 * model
    assert set(rows) <= {("send", "DCN"), ("all-gather", "ICI"), ("collective-permute", "ICI")}
