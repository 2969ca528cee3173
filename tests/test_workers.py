import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj

MESH = cj.make_mesh(8, devices=jax.devices()[:8])
WITH_INNER = cj.make_mesh(4, {"device": 2}, devices=jax.devices()[:8])


@pytest.mark.parametrize("where", [MESH, WITH_INNER, 8])
def test_copies_mean_and_worker_undo_each_other(where):
    n = where if isinstance(where, int) else where.shape["worker"]
    tree = {"w": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(1), "count": 3}
    stacked = cj.copies(tree, where)
    assert stacked["w"].shape == (n, 2, 3)
    cj.check_copies(stacked)
    np.testing.assert_array_equal(cj.one_worker(stacked, n - 1)["w"], tree["w"])
    np.testing.assert_array_equal(cj.mean_over_workers({"w": stacked["w"]})["w"], tree["w"])
    assert cj.one_worker(stacked, 0)["count"] == 3
    if not isinstance(where, int):
        assert stacked["w"].sharding == NamedSharding(where, P("worker"))


def test_mean_averages_bfloat16_in_float32_and_keeps_the_first_workers_counters():
    x = jnp.concatenate([jnp.full(1, 256.0), jnp.full(7, 1.0)]).astype(jnp.bfloat16)
    tree = {"x": x, "count": jnp.arange(8)}
    assert cj.mean_over_workers(tree)["x"] == jnp.asarray(
        263 / 8, jnp.bfloat16
    )  # summed in bfloat16 it would stay 256 / 8
    assert cj.mean_over_workers(tree)["count"] == 0


@pytest.mark.parametrize("where", [MESH, 8])
def test_a_step_sees_one_workers_values_and_replicated_arguments_whole(where):
    def step(x, scale):
        assert x.shape == (3,)
        assert scale.shape == (3,)
        return x * scale + jax.lax.axis_index("worker"), {"sum": x.sum()}

    x = jnp.arange(24.0).reshape(8, 3)
    x = x if where == 8 else jax.device_put(x, NamedSharding(MESH, P("worker")))
    y, metrics = cj.per_worker(step, where, replicated=(1,), donate=False)(x, jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(y, np.asarray(x) * [1, 2, 3] + np.arange(8)[:, None])
    np.testing.assert_allclose(metrics["sum"], np.asarray(x).sum(1))


def test_a_worker_of_two_devices_shares_its_batch_between_them():
    """Data parallelism inside a worker is the compiler's: the same numbers as one device per worker."""

    def step(w, x):
        return w - 0.1 * jax.grad(lambda w: ((x @ w) ** 2).mean())(w)

    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=(4, 6, 5)).astype(np.float32)
    spread = NamedSharding(WITH_INNER, P("worker", "device"))
    on_mesh = cj.per_worker(step, WITH_INNER)
    w_mesh = jax.device_put(w, NamedSharding(WITH_INNER, P("worker")))
    for _ in range(3):
        w_mesh = on_mesh(w_mesh, jax.device_put(x, spread))
        w = np.stack([np.asarray(step(w[i], x[i])) for i in range(4)])
    np.testing.assert_allclose(w_mesh, w, rtol=1e-5)
    assert on_mesh._cache_size() == 1


def test_consensus_distance_is_the_root_mean_square_distance_to_the_average():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(8, 3, 2)), "b": rng.normal(size=(8, 5)), "count": np.arange(8)}
    flat = np.concatenate([tree["a"].reshape(8, -1), tree["b"]], axis=1)
    expected = np.sqrt(((flat - flat.mean(0)) ** 2).sum(1).mean())
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else None), tree)
    np.testing.assert_allclose(cj.consensus_distance(tree), expected, rtol=1e-6)


@pytest.mark.parametrize("worker", range(1, 8))
def test_copies_that_differ_in_one_bit_are_refused_by_leaf_and_worker(worker):
    x = np.ones((8, 4), np.float32)
    x[worker, 2] = np.nextafter(np.float32(1), np.float32(2))
    with pytest.raises(ValueError, match=rf"leaf 'w' of worker {worker} differs"):
        cj.check_copies({"a": jnp.zeros((8, 2)), "w": jnp.asarray(x), "key": cj.copies(jax.random.key(0), 8)})


@pytest.mark.parametrize("where", [MESH, 8])
def test_weak_types_do_not_compile_twice_and_the_state_is_donated(where):
    tx = optax.sgd(0.1, momentum=0.9)
    algorithm = cj.crossover_sgd(tx, 8)
    step = cj.per_worker(lambda s, t: algorithm.update(s[0], s[1], s[0], t), where, (1,))
    state = cj.copies((jnp.full(16, 1.0), algorithm.init(jnp.full(16, 1.0))), where)
    first = state[0]
    for t in range(3):
        state = step(state, jnp.int32(t))
    assert step._cache_size() == 1
    assert first.is_deleted()


def test_parameters_that_are_committed_to_one_device_can_be_copied_to_a_mesh():
    x = jax.device_put(jnp.arange(3.0), jax.devices()[5])
    np.testing.assert_array_equal(cj.copies(x, MESH)[7], np.arange(3.0))


def test_equal_copies_may_hold_nan():
    cj.check_copies({"w": jnp.full((8, 2), jnp.nan)})


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="`i` must be from 0 to 7, got 8"):
        cj.one_worker(jnp.zeros((8, 2)), 8)
    with pytest.raises(ValueError, match="leaf 's' must have a leading axis of workers"):
        cj.check_copies({"s": jnp.zeros(())})
    with pytest.raises(ValueError, match="`inner` must map names other than 'worker' to sizes of at least 1"):
        cj.make_mesh(4, {"worker": 2})
    step = lambda x: x
    with pytest.raises(
        ValueError, match=r"leaf 'b' of argument 0 must have a leading axis of 8 workers, got shape \(3,\)"
    ):
        cj.per_worker(step, 8)({"a": jnp.zeros((8, 2)), "b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"must have a leading axis of 8 workers, got shape \(\)"):
        cj.per_worker(lambda x, t: x, MESH)(jnp.zeros((8, 2)), jnp.int32(0))
    with pytest.raises(ValueError, match=r"must have an axis 'replica', got a mesh with axes \('worker',\)"):
        cj.per_worker(step, MESH, axis="replica")
    with pytest.raises(ValueError, match=r"number of workers of at least 1 for each axis of .*, got 0"):
        cj.copies({}, 0)
    with pytest.raises(ValueError, match="needs 65 devices, got 64"):
        cj.make_mesh(65)
    with pytest.raises(ValueError, match="`num_workers` must be at least 1, got 0"):
        cj.make_mesh(0)
    with pytest.raises(ValueError, match="leaves 56 of 64 devices idle"):
        cj.make_mesh(8)


@pytest.mark.parametrize("where", [(3, 4), "3x4", "3x4x2"], ids=str)
def test_two_axes_of_workers_keep_one_leading_axis(where):
    """Gossip on two levels through `per_worker`, state and metrics `[workers, ...]`, against numpy."""
    axes = ("worker", "fast")
    if isinstance(where, str):
        sizes = tuple(map(int, where.split("x")))
        devices = np.asarray(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        where = jax.sharding.Mesh(devices, (*axes, "data")[: len(sizes)])
    fast, slow, table, cut = cj.topology.latin(4, 2), cj.topology.latin(3, 2), cj.topology.cycle(1, 2), cj.whole()
    mix = cj.chain(cj.gossip(fast, cut, table, "fast"), cj.every(2, cj.gossip(slow, cut, table)))

    def step(x, t):
        return mix(x, t), {"sum": x.sum(), "index": jax.lax.axis_index(axes)}

    run = cj.per_worker(step, where, replicated=(1,), axis=axes)
    x = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    state = jnp.asarray(x) if isinstance(where, tuple) else cj.from_local(x, where, axis=axes)
    for t in range(4):
        state, metrics = run(state, jnp.int32(t))
        np.testing.assert_allclose(metrics["sum"], x.sum(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(metrics["index"], np.arange(12))
        x = np.kron(np.eye(3), fast.matrix(t % 2)) @ x
        x = np.kron(slow.matrix(t // 2 % 2), np.eye(4)) @ x if t % 2 else x
        np.testing.assert_allclose(state, x, rtol=1e-4, atol=1e-6)
    assert cj.copies(np.zeros(3), where, axis=axes).shape == (12, 3)
    with pytest.raises(ValueError, match=r"for each axis of \('worker', 'fast'\), got 12"):
        cj.per_worker(step, 12, axis=axes)


BY_FSDP = cj.make_mesh(4, {"fsdp": 2}, devices=jax.devices()[:8])
TWO_AXES = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("worker", "fast", "fsdp"))
SPECS = {"w": P(None, "fsdp"), "rest": P()}


def mixed_dtypes():
    rest = {
        "low": jnp.ones(3, jnp.bfloat16),
        "count": jnp.int32(3),
        "key": jax.random.key(1),
        "weak": 0.5,
        "none": None,
    }
    return {"w": jnp.ones((2, 6)), "rest": rest}


@pytest.mark.parametrize("make", [mixed_dtypes, mixed_dtypes(), jax.eval_shape(mixed_dtypes)], ids="fts")
@pytest.mark.parametrize("specs", [None, SPECS], ids=["whole", "specs"])
@pytest.mark.parametrize(("where", "axes"), [(8, 1), (MESH, 1), (BY_FSDP, 1), ((2, 4), 2), (TWO_AXES, 2)], ids=str)
def test_abstract_copies_have_the_shapes_dtypes_and_shardings_of_copies(where, axes, specs, make):
    axis = "worker" if axes == 1 else ("worker", "fast")
    specs = None if where is MESH else specs  # it has no axis to shard over
    made = cj.copies(mixed_dtypes if callable(make) else mixed_dtypes(), where, specs=specs, axis=axis)
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), made)
    assert cj.abstract_copies(make, where, specs=specs, axis=axis) == expected


@pytest.mark.parametrize("where", [BY_FSDP, 4], ids=str)
def test_a_step_compiled_from_abstract_copies_runs_on_copies(where):
    specs, tx = P("fsdp"), optax.adam(1e-3)
    make = lambda: (jnp.ones(16), tx.init(jnp.ones(16)))
    of_state = (specs, cj.state_specs(jax.eval_shape(make)[1], jnp.ones(16), specs))
    algorithm = cj.crossover_sgd(tx, 4, specs=specs if where is BY_FSDP else None)
    step = cj.per_worker(lambda s, t: algorithm.update(s[0], s[1], s[0], t), where, (1,), out_specs=of_state)
    compiled = step.lower(
        cj.abstract_copies(make, where, specs=of_state), jax.ShapeDtypeStruct((), jnp.int32)
    ).compile()
    state = cj.copies(make, where, specs=of_state)
    for t in range(2):
        state = compiled(state, jnp.int32(t))  # it refuses another dtype, shape or sharding
    assert state[1][0].count.tolist() == [2] * 4


def test_abstract_copies_lie_on_the_default_device_and_make_nothing():
    with jax.default_device(jax.devices()[3]):
        assert cj.abstract_copies(jnp.ones(3), 4).sharding == cj.copies(lambda: jnp.ones(3), 4).sharding
    huge = cj.abstract_copies(lambda: jnp.zeros(2**50), MESH)
    assert huge.shape == (8, 2**50)
