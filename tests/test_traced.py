"""What a trace of one worker tells: its messages, counted, and its operations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax.traced import trace_worker, wire_bytes
from experiments.operations import operations


def model_bytes(params):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("make", "models_per_step"),
    [
        (lambda: cj.allreduce_sgd(optax.sgd(0.1)), 2 * 7 / 8),
        (lambda: cj.crossover_sgd(optax.sgd(0.1), 8, pool=cj.topology.latin(8, 4)), 1),
        (lambda: cj.mix_after(optax.sgd(0.1), cj.every(4, cj.crossover(8, pool=cj.topology.latin(8, 4)))), 1 / 4),
        (lambda: cj.sgp(optax.sgd(0.1), 8), 1),
        (lambda: cj.d_psgd(optax.sgd(0.1), 8), 2),
        (lambda: cj.local_sgd(optax.sgd(0.1), 2), 2 * 7 / 8 / 2),
        (
            lambda: cj.crossover_sgd(
                optax.sgd(0.1),
                8,
                pool=cj.topology.latin(8, 2),
                cut=cj.by_size(8),
                table=cj.topology.stream(8, 2, every=4),
            ),
            1 / 4,
        ),
    ],
)
def test_bytes_on_the_wire_are_counted_per_worker_and_step(make, models_per_step):
    params, algorithm = {"w": jnp.zeros((16, 8)), "b": jnp.zeros(64, jnp.bfloat16)}, make()
    state = algorithm.init(params)
    sent = [wire_bytes(lambda p, s, t=t: algorithm.update(p, s, p, t), params, state, num_workers=8) for t in range(4)]
    # All-reduce averages in float32: bfloat16 gradients travel as float32.
    widened = {"w": params["w"], "b": params["b"].astype(jnp.float32)}
    last = trace_worker(lambda p, s: algorithm.update(p, s, p, 3), params, state, axes={"worker": 8})
    whole = model_bytes(widened if "psum" in str(last) else params)
    np.testing.assert_allclose(np.mean(sent), models_per_step * whole)


def test_scans_conditionals_and_gathers_are_counted():
    psum = lambda x: jax.lax.psum(x, "worker")
    x, ring = jnp.zeros(10), 40 * 2 * 3 / 4
    scanned = lambda x: jax.lax.scan(lambda c, _: (psum(c), None), x, length=5)[0]
    either = lambda x: jax.lax.cond(x[0] > 0, lambda x: psum(psum(x)), psum, x)
    gathered = lambda x: jax.lax.all_gather(x, "worker")
    for function, expected in ((scanned, 5 * ring), (either, 2 * ring), (gathered, 40 * 3)):
        np.testing.assert_allclose(wire_bytes(function, x, num_workers=4), expected)


def test_fixed_points_are_no_message():
    pool = cj.topology.base(3)
    mix = cj.gossip(pool, cj.whole(), cj.topology.cycle(1, pool.num_rounds))
    sent = [wire_bytes(lambda x, p=p: mix(x, p), jnp.zeros(30), num_workers=3) for p in range(pool.num_rounds)]
    moved = [(pool.receive_from[p] != np.arange(3)).sum() for p in range(pool.num_rounds)]
    np.testing.assert_allclose(sent, [120 * m / 3 for m in moved])
    assert 2 in moved


@jax.custom_vjp
def with_its_own_gradient(x):
    return jax.lax.psum(x @ x, "worker")


with_its_own_gradient.defvjp(lambda x: (with_its_own_gradient(x), None), lambda _, g: (g,))


@jax.custom_jvp
def with_its_own_tangent(x):
    return jax.lax.psum(x @ x, "worker")


with_its_own_tangent.defjvp(lambda x, dx: (with_its_own_tangent(*x), *dx))


def plain(x):
    return jax.lax.psum(x @ x, "worker")


WRAPPED = {
    "as it is": plain,
    "jit": jax.jit(plain),
    "remat": jax.checkpoint(plain),
    "custom_vjp": with_its_own_gradient,
    "custom_jvp": with_its_own_tangent,
    "while": lambda x: jax.lax.while_loop(lambda x: (x < 1).all(), plain, x),
    "jit in remat in scan": lambda x: jax.lax.scan(lambda c, _: (jax.checkpoint(jax.jit(plain))(c), None), x, length=1)[
        0
    ],
    "vmap": lambda x: jax.vmap(plain)(x[None])[0],
}


@pytest.mark.parametrize("name", WRAPPED)
def test_bytes_and_operations_are_counted_whatever_is_around_them(name):
    function, x = WRAPPED[name], jnp.zeros((10, 10))
    assert operations(function, x, axes={"worker": 4}) == 2000
    assert wire_bytes(function, x, num_workers=4) == 400 * 2 * 3 / 4


def test_operations_of_a_shard_map_over_another_axis_are_counted():
    inner = jax.shard_map(plain, axis_names={"device"}, in_specs=P(), out_specs=P(), check_vma=False)
    assert operations(inner, jnp.zeros((10, 10)), axes={"worker": 4, "device": 2}) == 2000


def test_a_gradient_is_two_products_more_and_a_recomputed_one_three():
    w = jnp.zeros((10, 10))
    loss = lambda x: (jnp.sin(x @ w) @ w).sum()
    assert operations(loss, w) == 2 * 2000
    assert operations(jax.grad(loss), w) == 4 * 2000  # by x only: one product for each
    assert operations(jax.grad(jax.checkpoint(loss)), w) == 5 * 2000  # the first again, for the sine's derivative


def test_a_trace_has_the_table_among_its_constants_and_sends_by_permutes():
    table = cj.topology.shuffle(4, 4)
    mix = cj.gossip(cj.topology.latin(8, 4), cj.by_size(4), table)
    shapes = jax.ShapeDtypeStruct((40,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    traced = trace_worker(mix, *shapes, axes={"worker": 8})
    assert str(traced).count("ppermute") == 4
    assert "all_gather" not in str(traced)  # by which a simulated exchange reads the others
    assert [v.aval.shape for v in traced.jaxpr.invars] == [(40,), ()]
    assert [v.aval.shape for v in traced.jaxpr.constvars] == [x.shape for x in traced.consts]
    assert any(np.array_equal(x, np.argsort(table, axis=1)) or np.array_equal(x, table) for x in traced.consts)


@pytest.mark.parametrize("axes", [{}, {"worker": 8}, {"pod": 2, "worker": 4}])
def test_a_function_sees_the_axes_it_was_promised_and_no_others(axes):
    def sizes(x):
        assert set(jax.sharding.get_abstract_mesh().manual_axes) == set(axes)
        return x * np.prod([jax.lax.axis_size(name) for name in axes])

    traced = trace_worker(sizes, jnp.zeros(3), axes=axes)
    assert str(float(np.prod([*axes.values()]))) in str(traced)
    with pytest.raises(NameError, match="unbound axis name"):
        trace_worker(lambda x: jax.lax.psum(x, "elsewhere"), jnp.zeros(3), axes=axes)


def test_neither_a_mesh_around_nor_the_places_of_arguments_change_a_trace():
    mesh = cj.make_mesh(4, {"device": 2}, devices=jax.devices()[:8])
    x = jax.device_put(jnp.zeros((8, 4)), NamedSharding(mesh, P("worker", "device")))
    plain = wire_bytes(lambda x: cj.average()(x, 0), jnp.zeros((8, 4)), num_workers=8)
    assert wire_bytes(lambda x: cj.average()(x, 0), x, num_workers=8) == plain > 0
    with jax.set_mesh(mesh):
        assert wire_bytes(lambda x: cj.average()(x, 0), x, num_workers=8) == plain


def test_random_keys_python_numbers_and_none_are_arguments_and_results():
    def step(key, k, nothing):
        return jax.random.normal(key, (2,)) * k, nothing, k

    traced = trace_worker(step, jax.random.key(0), 3, None, axes={"worker": 2})
    assert [v.aval.shape for v in traced.jaxpr.outvars] == [(2,), ()]


def test_a_collective_of_unknown_cost_is_refused():
    with pytest.raises(ValueError, match="knows ppermute, psum, pmax, pmin and all_gather, got all_to_all over axis"):
        wire_bytes(lambda x: jax.lax.all_to_all(x, "worker", 0, 0), jnp.zeros(4), num_workers=4)
