"""What the compiler makes of an exchange, ahead of time for TPU pods that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from experiments.compiled import collectives, schedule, traffic

pytestmark = pytest.mark.full_compilation
SLICES, LAYERS, WIDTH = 4, 6, 1024
POOLS = {
    "latin": lambda n: cj.topology.latin(n, 8),
    "exponential": cj.topology.exponential,
    "ring": lambda n: cj.topology.ring(n),
    "symmetric": lambda n: cj.topology.symmetric(n, 4, slices=SLICES),
    "derangements": lambda n: cj.topology.derangements(n, 4),
}


@pytest.fixture(scope="module")
def pod():
    return chips(SLICES)


def chips(slices):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=slices).devices
    return sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.id))


def loss(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def compiled_step(pool, devices, *, during, in_flight=None, cut=cj.by_size):
    """The compiled train step of a stack of matrices on one worker per chip."""
    mix = cj.crossover(len(devices), pool=pool, cut=cut(pool.num_rounds), in_flight=in_flight)
    return compiled((cj.mix_during if during else cj.mix_after)(optax.sgd(0.1, momentum=0.9), mix), devices)


def compiled(algorithm, devices, length=None):
    """The same of any algorithm: one step, or a period of `length`."""
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
    return cj.per_worker(whole, mesh, replicated=(2,)).lower(*shapes, t).compile()


@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_pools_alike_in_every_slice_compile_for_four_slices_without_a_conditional(pod, name, during):
    pool = POOLS[name](len(pod))
    found = collectives(compiled_step(pool, pod, during=during).as_text())
    assert (found.pop("conditional", 0) > 0) == (name == "derangements")
    assert found.pop("send", 0) > 0
    found.pop("collective-permute", 0)  # pairs inside a slice
    assert not found


@pytest.mark.parametrize(
    ("pool", "slices", "cut"),
    [
        # Within a slice libtpu has five permutes in flight, the sixth follows the first.
        (lambda n: cj.topology.latin(n, 5), 1, cj.by_size),
        (lambda n: cj.topology.latin(n, 4), 1, cj.by_rows),
        (POOLS["exponential"], 1, cj.by_size),
        (POOLS["latin"], 4, cj.by_size),
        (POOLS["latin"], 4, cj.by_rows),
        (POOLS["exponential"], 4, cj.by_size),
        (POOLS["ring"], 4, cj.by_size),
        (POOLS["latin"], 8, cj.by_size),
    ],
)
def test_mixing_during_the_step_sends_before_the_first_matmul_and_is_done_after_the_last(pool, slices, cut):
    devices = chips(slices)
    order = schedule(compiled_step(pool(len(devices)), devices, during=True, cut=cut).as_text())
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
    devices = chips(1)
    order = schedule(
        compiled_step(cj.topology.latin(len(devices), 5), devices, during=True, in_flight=in_flight).as_text()
    )
    steps = {"collective-permute-start": 1, "collective-permute-done": -1}
    under_way = np.cumsum([steps.get(op, 0) for op in order])
    assert under_way.max() == in_flight
    assert sum(op == "collective-permute-start" for op in order) == 5


def test_mixing_after_the_step_cannot_be_hidden_and_the_schedule_shows_it(pod):
    order = schedule(compiled_step(POOLS["latin"](len(pod)), pod, during=False).as_text())
    assert order.index("send") > max(i for i, op in enumerate(order) if op == "matmul")


@pytest.mark.parametrize("wire", [None, "int4"])
@pytest.mark.parametrize("slices", [1, 4])
def test_an_exchange_stays_under_way_across_the_loop_over_a_period_s_steps(slices, wire):
    devices = chips(slices)
    n = len(devices)
    mix = cj.crossover(n, pool=cj.topology.latin(n, 4), wire=wire)
    outer = cj.outer(optax.sgd(0.1), optax.sgd(0.7, momentum=0.9, nesterov=True), mix, every=8, overlap=True)
    text = compiled(outer, devices, length=8).as_text()
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


def test_without_overlap_the_exchange_of_a_period_follows_its_loop(pod):
    outer = cj.outer(optax.sgd(0.1), None, cj.crossover(len(pod), pool=POOLS["latin"](len(pod))), every=4)
    order = schedule(compiled(outer, pod, length=4).as_text())
    assert order.index("while") < order.index("send")


@pytest.mark.parametrize("hierarchical", [False, True])
def test_the_traffic_of_a_pod_is_one_model_per_worker_over_dcn(pod, hierarchical):
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
