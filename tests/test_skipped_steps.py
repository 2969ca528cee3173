"""One worker's step goes wrong, or its loop takes it back: what peers receive, what is counted, what the sum does."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from experiments.compiled import collectives

WORKERS, BAD = 4, 1
SGD = optax.sgd(0.1, momentum=0.9)
PULL = cj.topology.pull(WORKERS, 3, seed=1).transpose()
ALGORITHMS = {
    "crossover": lambda o: cj.crossover_sgd(o, WORKERS),
    "during": lambda o: cj.mix_during(o, cj.crossover(WORKERS)),
    "with momentum": lambda o: cj.mix_with_momentum(o, cj.crossover(WORKERS)),
    "relative": lambda o: cj.mix_relative(o, cj.crossover(WORKERS), 3),
    "every": lambda o: cj.mix_after(o, cj.every(2, cj.crossover(WORKERS))),
    "sgp": lambda o: cj.sgp(o, WORKERS),
    "local sgd": lambda o: cj.local_sgd(o, 2),
    "int8": lambda o: cj.mix_after(o, cj.repeat(3, cj.crossover(WORKERS, wire="int8"))),
    "ring": lambda o: cj.d_psgd(o, WORKERS),
}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
everywhere = pytest.mark.parametrize("where", ["mesh", "simulated"])


def place_of(where):
    return WORKERS if where == "simulated" else cj.make_mesh(WORKERS, devices=jax.devices()[:WORKERS])


def put(tree, where):
    return tree if isinstance(where, int) else jax.device_put(tree, NamedSharding(where, P("worker")))


def values(seed=0):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(WORKERS, 24)).astype(np.float32), "b": rng.normal(size=(WORKERS, 3, 4)).astype("f4")}


def total(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), tree)


@everywhere
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@every_algorithm
def test_a_worker_whose_update_is_not_finite_sends_its_unchanged_parameters(name, wrong, where):
    """The sum moves by the other workers' updates alone, and momentum and parameters stay finite everywhere."""
    algorithm, where = ALGORITHMS[name](SGD), place_of(where)
    x, grads = values(), values(1)
    grads["b"][BAD, 1, 2] = wrong  # one element of one leaf
    state = put(
        (jax.tree.map(jnp.asarray, x), cj.copies(algorithm.init({k: v[0] for k, v in x.items()}), WORKERS)), where
    )
    if name == "relative":
        state = put(
            (
                state[0],
                state[1]._replace(
                    reference=jax.tree.map(lambda v: np.tile(v[:1], (WORKERS,) + (1,) * (v.ndim - 1)), x)
                ),
            ),
            where,
        )
    step = cj.per_worker(lambda s, g, t: algorithm.update(g, s[1], s[0], t), where, (2,))
    state = step(state, put(grads, where), jnp.int32(1))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(state))
    stepped = {k: v - 0.1 * grads[k] for k, v in x.items()}
    for key in x:
        stepped[key][BAD] = x[key][BAD]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), total(state[0]), total(stepped))
    momentum = jax.tree.leaves(state[1])
    if name in ("crossover", "during", "sgp"):
        assert all((np.asarray(m)[BAD] == 0).all() for m in momentum if m.ndim > 1)


@everywhere
def test_no_worker_steps_where_a_gradient_that_all_average_is_not_finite(where):
    algorithm, where = cj.allreduce_sgd(SGD), place_of(where)
    x, grads = np.ones((WORKERS, 5), np.float32), np.ones((WORKERS, 5), np.float32)
    grads[BAD, 0] = np.nan
    state = put((jnp.asarray(x), cj.copies(algorithm.init(x[0]), WORKERS)), where)
    step = cj.per_worker(lambda s, g: algorithm.update(g, s[1], s[0], 0), where)
    state = step(state, put(grads, where))
    np.testing.assert_array_equal(state[0], x)
    state = step(state, put(np.ones_like(grads), where))
    np.testing.assert_allclose(state[0], 0.9)


def test_counters_go_on_and_what_was_not_finite_before_does_not_count():
    """A schedule stays in step with the other workers; a mask of −inf among the parameters stops nobody."""
    optimizer = optax.adam(lambda count: 0.1 / (1 + count))
    algorithm = cj.crossover_sgd(optimizer, WORKERS)
    x = {"w": jnp.ones((WORKERS, 40)), "mask": jnp.full((WORKERS, 8), -jnp.inf)}
    grads = {"w": jnp.ones((WORKERS, 40)).at[BAD].set(jnp.nan), "mask": jnp.zeros((WORKERS, 8))}
    state = (x, cj.copies(algorithm.init(jax.tree.map(lambda v: v[0], x)), WORKERS))
    step = cj.per_worker(lambda s, g, t: algorithm.update(g, s[1], s[0], t), WORKERS, (2,))
    new, inner = step(state, grads, jnp.int32(0))
    assert [c.tolist() for c in jax.tree.leaves(inner) if c.dtype == jnp.int32] == [[1] * WORKERS] * 2
    assert np.isneginf(new["mask"]).all()
    np.testing.assert_allclose(new["w"].sum(), WORKERS * 40 - 3 * 40 * 0.1, rtol=1e-5)


class ScaledState(TrainState):
    scale: DynamicScale


@everywhere
@pytest.mark.parametrize("name", [*ALGORITHMS, "allreduce"])
def test_flax_dynamic_scale_which_takes_one_workers_step_back(name, where):
    """Learning rate 0: what the loop takes back is the exchange, and the sum moves by exactly that."""
    where = place_of(where)
    algorithm = (
        cj.allreduce_sgd(optax.sgd(0.0)) if name == "allreduce" else ALGORITHMS[name](optax.sgd(0.0, momentum=0.9))
    )
    net = nn.Dense(3)
    params = net.init(jax.random.key(0), jnp.zeros((2, 6)))

    def step(state, x):
        scale, is_finite, _, grads = state.scale.value_and_grad(lambda p: (net.apply(p, x) ** 2).sum())(state.params)
        new = state.apply_gradients(grads=grads)
        restore = functools.partial(jnp.where, is_finite)
        return new.replace(
            scale=scale,
            params=jax.tree.map(restore, new.params, state.params),
            opt_state=jax.tree.map(restore, new.opt_state, state.opt_state),
        ), (is_finite, new.params)

    state = cj.copies(
        ScaledState.create(apply_fn=net.apply, params=params, tx=cj.as_optax(algorithm), scale=DynamicScale()), where
    )
    apart = jax.tree.map(
        lambda v: v + np.random.default_rng(1).normal(size=v.shape).astype("f4"), jax.device_get(state.params)
    )
    if name not in ("allreduce", "relative"):
        state = state.replace(params=put(jax.tree.map(jnp.asarray, apart), where))
    run = cj.per_worker(step, where)
    for t in range(5):
        before = jax.device_get(state.params)
        x = jnp.ones((WORKERS, 2, 6)).at[BAD].multiply(1e38 if t == 2 else 1.0)
        state, (is_finite, exchanged) = run(state, put(x, where))
        assert is_finite.tolist() == [True] * WORKERS if t != 2 else [i != BAD for i in range(WORKERS)]
        moved = jax.tree.map(np.subtract, total(state.params), total(before))
        taken_back = jax.tree.map(lambda b, e: b[BAD] - np.asarray(e)[BAD] if t == 2 else 0 * b[BAD], before, exchanged)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), moved, taken_back)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(state.params))
    assert state.opt_state.count.tolist() == [5] * WORKERS
    assert run._cache_size() == 1
    cj.resize(jax.device_get((state.params, state.opt_state)), cj.overlap_matrix(WORKERS, 2))


@everywhere
@pytest.mark.parametrize("name", ["crossover", "sgp", "every"])
def test_a_worker_that_is_reset_goes_on_in_step_with_all(name, where):
    """Its optimizer begins anew; its count, by which segments are chosen, is everybody's at the next step."""
    where = place_of(where)
    tx = cj.as_optax(ALGORITHMS[name](optax.sgd(0.0)))
    x = np.random.default_rng(0).normal(size=(WORKERS, 28)).astype(np.float32)

    def step(state, reset):
        updates, inner = tx.update(jnp.zeros(28), state[1], state[0])
        fresh = tx.init(state[0])
        return optax.apply_updates(state[0], updates), jax.tree.map(lambda a, b: jnp.where(reset, a, b), fresh, inner)

    run, apart = cj.per_worker(step, where), {}
    for resets in (False, True):
        state = put((jnp.asarray(x), cj.copies(tx.init(jnp.zeros(28)), WORKERS)), where)
        for t in range(6):
            state = run(state, put(jnp.array([resets and t in (1, 2) and i == BAD for i in range(WORKERS)]), where))
        apart[resets] = np.asarray(state[0])
        assert state[1].count.tolist() == [6] * WORKERS
    np.testing.assert_array_equal(apart[True], apart[False])


@everywhere
def test_push_sum_goes_on_with_the_weight_of_a_restored_worker(where):
    """Mass and weights of the old state come back together: z stays a weighted mean of what workers hold."""
    where = place_of(where)
    algorithm = cj.push_sum(optax.sgd(0.0), PULL, cj.by_size(2), cj.topology.sample)
    x = np.random.default_rng(0).normal(size=(WORKERS, 8)).astype(np.float32)

    def step(state, restored, t):
        new = algorithm.update(jnp.zeros(8), state[1], state[0], t)
        return jax.tree.map(lambda a, b: jnp.where(restored, a, b), state, new)

    run = cj.per_worker(step, where, (2,))
    state = put((jnp.asarray(x), cj.copies(algorithm.init(jnp.zeros(8)), WORKERS)), where)
    table, cut = cj.topology.sample(2, PULL.num_rounds), cj.by_size(2)
    segment = cut.segment_of(x[0])
    mass, weights = x.astype(np.float64), np.ones((WORKERS, 2))
    for t in range(6):
        restored = np.array([t == 2 and i == BAD for i in range(WORKERS)])
        state = run(state, put(jnp.asarray(restored), where), jnp.int32(t))
        for s in range(2):
            W, here = PULL.matrix(table[t, s]), segment == s
            mass[:, here] = np.where(restored[:, None], mass[:, here], W @ mass[:, here])
            weights[:, s] = np.where(restored, weights[:, s], W @ weights[:, s])
    np.testing.assert_allclose(state[0], mass, rtol=1e-5, atol=1e-6)
    z = cj.per_worker(lambda s: algorithm.model(*s), where, donate=False)(state)
    np.testing.assert_allclose(z, mass / weights[:, segment], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["crossover", "during", "with momentum"])
def test_looking_for_what_is_not_finite_sends_nothing(name):
    where = place_of("mesh")
    algorithm = ALGORITHMS[name](SGD)
    x = put(jnp.zeros((WORKERS, 90)), where)
    state = (x, put(cj.copies(algorithm.init(jnp.zeros(90)), WORKERS), where))
    step = cj.per_worker(lambda s, g, t: algorithm.update(g, s[1], s[0], t), where, (2,))
    found = collectives(step.lower(state, x, jnp.int32(0)).compile().as_text())
    assert found == {"collective-permute": 6 if name == "with momentum" else 3}
