"""A step is the same program on a mesh and simulated: same values, same gradients, and the same steps refused."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax.axes import is_simulated
from experiments.compiled import collectives

WORKERS = 4
X = np.random.default_rng(0).normal(size=(WORKERS, 2, 5)).astype(np.float32)
AXIS = "worker"


def mesh():
    return cj.make_mesh(WORKERS, devices=jax.devices()[:WORKERS])


def ring(x):
    return lax.ppermute(x, AXIS, [(i, (i + 1) % WORKERS) for i in range(WORKERS)])


def lstm(x):
    cell = nn.RNN(nn.LSTMCell(3))
    params = cell.init(jax.random.key(0), jnp.zeros((1, 2, 5)))
    return jax.grad(lambda p: (cell.apply(p, x[None]) ** 2).sum())(params)


def gru_of_nnx(x):
    return jax.grad(lambda x: (nnx.RNN(nnx.GRUCell(5, 3, rngs=nnx.Rngs(0)))(x[None]) ** 2).sum())(x)


def ctc(x):
    logits = jnp.stack([x, x])
    loss = lambda l: optax.ctc_loss(l, jnp.zeros(l.shape[:2]), jnp.ones((2, 1), int), jnp.zeros((2, 1))).sum()
    return jax.grad(loss)(logits)


def accumulated(x):
    zeros = jnp.zeros(5)
    total, _ = lax.scan(lambda total, row: (total + jax.grad(lambda r: (r**2).sum())(row), None), zeros, x)
    return total


def lbfgs(x):
    optimizer, f = optax.lbfgs(), lambda p: ((p - x) ** 2).sum()
    params = jnp.zeros_like(x)
    state = optimizer.init(params)
    for _ in range(2):
        value, grad = optax.value_and_grad_from_state(f)(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=f)
        params = optax.apply_updates(params, updates)
    return params


def plateau(x):
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    state = optimizer.init(x)
    for _ in range(3):
        updates, state = optimizer.update(x, state, x, value=x.sum())
    return updates


def batch_norm_of_equinox(x):
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(5, "batch", mode="ema")
    out, _ = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)
    return out


def constant_cotangent(x):
    @jax.custom_vjp
    def f(x):
        return (x**2).sum()

    f.defvjp(lambda x: (f(x), None), lambda _, g: (jnp.ones((2, 5)),))
    return jax.grad(f)(x)


def pallas(x):
    from jax.experimental import pallas as pl

    def double(x, y):
        y[...] = x[...] * 2

    return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct((2, 5), jnp.float32), interpret=True)(x)


STEPS = {
    "lstm": lstm,
    "gru of nnx": gru_of_nnx,
    "ctc": ctc,
    "accumulated": accumulated,
    "lbfgs": lbfgs,
    "plateau": plateau,
    "batch norm of equinox": batch_norm_of_equinox,
    "constant cotangent": constant_cotangent,
    "pallas": pallas,
    "a condition with constants": lambda x: lax.cond(x.sum() > 0, lambda: 0.0, lambda: x.sum()),
    "while from a constant": lambda x: lax.while_loop(lambda c: c < x.sum(), lambda c: c + 1.0, 0.0),
    "collectives over an own axis": lambda x: jax.vmap(lambda r: lax.all_gather(r, "row"), axis_name="row")(x),
    "gradient by a constant": lambda x: jax.grad(lambda t: ((x - t * x) ** 2).sum())(0.0),
    "hessian": lambda x: jax.hessian(lambda t: (jnp.exp(t * x) ** 2).sum())(0.5),
    "gradient through pmean": lambda x: jax.grad(lambda x: lax.pmean((x**2).sum(), AXIS))(x),
    "gradient through psum of a constant": lambda x: jax.grad(lambda t: lax.psum(t * x.sum(), AXIS))(1.0),
    "gradient through ppermute": lambda x: jax.grad(lambda x: (ring(x**2) * lax.axis_index(AXIS)).sum())(x),
    "gradient through all_gather": lambda x: jax.grad(lambda x: (lax.all_gather(x, AXIS) ** 3).sum())(x),
    "average in a checkpoint": lambda x: jax.checkpoint(lambda x: cj.average()(x, 0))(x),
    "gossip in a scan": lambda x: lax.scan(lambda x, t: (cj.crossover(WORKERS)(x, t), None), x, jnp.arange(3))[0],
    "gossip in jit": lambda x: jax.jit(cj.crossover(WORKERS))(x, 1),
    "gradient through gossip": lambda x: jax.grad(lambda x: (cj.crossover(WORKERS)(x, 2) ** 2).sum())(x),
}


# Its `State.set` compares shardings of shapes, and refuses its own values inside any `shard_map` of JAX 0.12.
NOT_YET = pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="equinox 0.13.8 on a mesh of JAX 0.12")


@pytest.mark.parametrize("name", [pytest.param(n, marks=NOT_YET) if n == "batch norm of equinox" else n for n in STEPS])
def test_values_and_gradients_are_the_same_on_a_mesh_and_simulated(name):
    on_mesh, simulated = (cj.per_worker(STEPS[name], where, donate=False)(X) for where in (mesh(), WORKERS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), on_mesh, simulated)


def test_gradients_are_each_workers_own():
    """Not those of all workers summed up, as types that know of replication would have it."""
    got = cj.per_worker(STEPS["gradient by a constant"], mesh(), donate=False)(X)
    np.testing.assert_allclose(got, -2 * (X**2).sum((1, 2)), rtol=1e-5)
    through_pmean = cj.per_worker(STEPS["gradient through pmean"], mesh(), donate=False)(X)
    np.testing.assert_allclose(through_pmean, 2 * X, rtol=1e-5)  # n of n/n, as `jax.vmap` has it


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.grad, lambda f: lambda x: lax.map(f, x[None])[0]])
def test_mesh_or_simulation_is_known_inside_every_transformation(wrap):
    known = []

    def step(x):
        def inside(x):
            known.append(is_simulated(AXIS))
            return (x**2).sum()

        return wrap(inside)(x)

    for where, expected in ((mesh(), False), (WORKERS, True)):
        known.clear()
        cj.per_worker(step, where, donate=False)(X)
        assert set(known) == {expected}


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: lambda x: lax.map(f, x[None])[0]])
def test_a_simulated_average_adds_vectors_inside_every_transformation(wrap):
    """`pmean` under `vmap` becomes a reduction over the workers, 8 to 18 times as slow on a CPU."""
    average = lambda x: cj.average()(x, 0)
    text = cj.per_worker(wrap(average), WORKERS).lower(X).compile().as_text()
    assert not [line for line in text.splitlines() if " reduce(" in line and "axis" in line]
    assert "while" in text  # one worker added after the other


def test_explicit_axes_take_numpy_batches():
    where = jax.make_mesh((WORKERS,), (AXIS,), axis_types=(AxisType.Explicit,), devices=jax.devices()[:WORKERS])
    got, expected = (
        cj.per_worker(cj.crossover(WORKERS), place, (1,), donate=False)(X, jnp.int32(1)) for place in (where, WORKERS)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def adam_if_finite(axis):
    tx = optax.apply_if_finite(cj.as_optax(cj.crossover_sgd(optax.adam(0.1), WORKERS, axis=axis)), 3)
    return lambda x, t: tx.update(x, tx.init(x), x)[0]


def own(t):
    """A step that each worker counts for itself."""
    return t + lax.axis_index(AXIS)


def optimizer_step(algorithm, t):
    return lambda x, shared: algorithm.update(x, algorithm.init(x), x, t(shared))[0]


SGD = optax.sgd(0.1)
ALGORITHMS = {
    "sgp": lambda: cj.sgp(SGD, WORKERS),
    "local sgd": lambda: cj.local_sgd(SGD, 2),
    "every": lambda: cj.mix_after(SGD, cj.every(2, cj.crossover(WORKERS))),
    "sampled table": lambda: cj.crossover_sgd(SGD, WORKERS, table=cj.topology.sample),
    "channels": lambda: cj.crossover_sgd(SGD, WORKERS),
    "during": lambda: cj.mix_during(SGD, cj.crossover(WORKERS)),
    "relative": lambda: cj.mix_relative(SGD, cj.crossover(WORKERS), 3),
    "push-sum": lambda: cj.sgp(SGD, WORKERS, pool=cj.topology.pull(WORKERS, 3).transpose()),
}


@pytest.mark.parametrize("where", ["mesh", "simulated"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_of_each_workers_own_is_refused_and_a_shared_one_passes(name, where):
    where = mesh() if where == "mesh" else WORKERS
    algorithm = ALGORITHMS[name]()
    for t in (
        own,
        lambda t: jnp.where(lax.axis_index(AXIS) == 1, t, t + 1),
        lambda t: lax.scan(lambda c, _: (c + lax.axis_index(AXIS), None), t, None, 2)[0],
    ):
        with pytest.raises(
            ValueError, match="`step` must be the same on all workers, but it varies over axis 'worker'"
        ):
            cj.per_worker(optimizer_step(algorithm, t), where, (1,), donate=False)(X, jnp.int32(1))
    for t in (lambda t: t, lambda t: lax.pmax(own(t), AXIS), lambda t: lax.all_gather(own(t), AXIS)[0]):
        cj.per_worker(optimizer_step(algorithm, t), where, (1,), donate=False)(X, jnp.int32(1))


def skipped_by_a_worker(x, t):
    return lax.cond(x.sum() > 0, lambda x: cj.crossover(WORKERS)(x, t), lambda x: x, x)


def hangs_in_a_loop(x, t):
    return lax.while_loop(lambda x: x.sum() > 1, lambda x: lax.pmean(x, AXIS), x)


def hidden(x, t):
    f = jax.jit(lambda x: lax.cond(x.max() > 0, lambda x: lax.psum(x, AXIS), lambda x: x, x))
    return lax.scan(lambda x, _: (jax.checkpoint(f)(x), None), x, None, 2)[0]


@pytest.mark.parametrize("where", ["mesh", "simulated"])
@pytest.mark.parametrize("step", [adam_if_finite(None), skipped_by_a_worker, hangs_in_a_loop, hidden])
def test_a_collective_that_a_worker_may_skip_is_refused(step, where):
    where = mesh() if where == "mesh" else WORKERS
    with pytest.raises(ValueError, match=r"over axis 'worker' must not stand in a (condition|loop) that differs"):
        cj.per_worker(step, where, (1,), donate=False)(X, jnp.int32(1))


def decided_together(x, t):
    ok = lax.pmin(jnp.isfinite(x).all(), AXIS)
    return lax.cond(ok, lambda x: cj.crossover(WORKERS)(x, t), lambda x: x, x)


def finite_inside(x, t):
    algorithm = cj.crossover_sgd(optax.apply_if_finite(optax.adam(0.1), 3), WORKERS)
    return algorithm.update(x, algorithm.init(x), x, t)[0]


def accumulated_around(x, t):
    tx = optax.MultiSteps(cj.as_optax(cj.crossover_sgd(optax.adam(0.1), WORKERS)), 2)
    return tx.update(x, tx.init(x), x)[0]


@pytest.mark.parametrize("where", ["mesh", "simulated"])
@pytest.mark.parametrize("step", [decided_together, finite_inside, accumulated_around])
def test_what_all_workers_enter_passes(step, where):
    where = mesh() if where == "mesh" else WORKERS
    out = cj.per_worker(step, where, (1,), donate=False)(X, jnp.int32(1))
    assert np.isfinite(out).all()


@pytest.mark.parametrize("axes", [("worker", "fast")])
def test_on_two_levels_a_step_must_be_shared_along_both(axes):
    mix = cj.gossip(cj.topology.latin(2, 1), cj.whole(), axis="worker")
    for where in ((2, 2), jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), axes)):
        for name in axes:
            step = lambda x, t, name=name: mix(x, t + lax.axis_index(name))
            with pytest.raises(
                ValueError, match=f"`step` must be the same on all workers, but it varies over axis '{name}'"
            ):
                cj.per_worker(step, where, (1,), axis=axes)(X, jnp.int32(0))
        shared = lambda x, t: mix(x, lax.pmax(t + lax.axis_index(axes), axes))
        cj.per_worker(shared, where, (1,), axis=axes, donate=False)(X, jnp.int32(0))


def test_the_guard_costs_no_collective():
    """The step's mark and the walk leave nothing in the compiled program."""
    step = cj.per_worker(lambda x, t: cj.crossover(WORKERS)(x, t), mesh(), (1,))
    x = jax.device_put(X, NamedSharding(mesh(), P(AXIS)))
    assert set(collectives(step.lower(x, jnp.int32(0)).compile().as_text())) <= {"collective-permute"}
