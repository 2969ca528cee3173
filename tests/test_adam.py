"""Adam for gossiping workers against numpy, and against the second moment that an all-reduce would see."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crossover_jax as cj
from crossover_jax.traced import wire_bytes
from tests.oracles import mixed_by_matrices

WORKERS = 8


def run(tx, gradients):
    """Updates and second moments of a leaf: `gradients` are `[steps, ...]`."""

    def step(state, g):
        update, state = tx.update({"w": g}, state)
        return state, update["w"]

    return jax.lax.scan(step, tx.init({"w": jnp.zeros(gradients.shape[1:])}), jnp.asarray(gradients, jnp.float32))


def second_moment(tx, gradients, b1=0.9):
    """v' of the last step, read from the update m̂ / √v'."""
    state, updates = run(tx, gradients)
    m_hat = state.mu["w"] / (1 - b1 ** len(gradients))
    return np.asarray((m_hat / updates[-1]) ** 2)


def noisy(signal, steps=400, workers=WORKERS, size=4000, seed=0):
    """Gradients `[workers, steps, size]` of one signal `[size]` and noise of variance 1."""
    return np.random.default_rng(seed).normal(size=(workers, steps, size)).astype(np.float32) + signal


def test_it_is_the_docstrings_equation():
    n, b1, b2 = 8, 0.8, 0.95
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 3, 4)) + 0.5
    _, updates = run(cj.scale_by_gossip_adam(n, b1, b2, eps=0.0), gradients)
    m = v = np.zeros((3, 4))
    signal = 0.0
    for t, g in enumerate(gradients):
        if t:
            signal = b2 * signal + (1 - b2) * np.sum(g * gradients[t - 1])
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        r = np.clip(signal / (1 - b2**t) / v_hat.sum(), 0, 1) if t else 1.0
        np.testing.assert_allclose(updates[t], m_hat / np.sqrt(v_hat * (1 / n + (1 - 1 / n) * r)), rtol=1e-5)


@pytest.mark.parametrize("signal", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("workers", [2, 8, 32])
def test_the_second_moment_is_that_of_the_average_gradient(signal, workers):
    """μ² + σ²/n, whatever part of a gradient is noise; plain Adam's is μ² + σ²."""
    gradients = noisy(signal, workers=1)[0]
    found = second_moment(cj.scale_by_gossip_adam(workers, b2=0.99, eps=0.0), gradients).mean()
    plain = second_moment(optax.scale_by_adam(b2=0.99, eps=0.0), gradients).mean()
    right = signal**2 + 1 / workers
    assert found == pytest.approx(right, rel=0.06)
    assert plain == pytest.approx(signal**2 + 1, rel=0.03)


def test_workers_that_gossip_take_the_steps_of_adam_on_the_average_gradient():
    """Momenta averaged over the workers, as mixed parameters feel them, over √v' against Adam behind an all-reduce."""
    gradients = noisy(0.2 * np.random.default_rng(1).normal(size=4000))
    behind_allreduce = run(optax.scale_by_adam(b2=0.99), gradients.mean(0))[1][-50:]
    steps = {
        name: np.mean([run(tx, own)[1][-50:] for own in gradients], 0)
        for name, tx in (("gossip", cj.scale_by_gossip_adam(WORKERS, b2=0.99)), ("plain", optax.scale_by_adam(b2=0.99)))
    }
    length = {name: np.sqrt(np.mean(x**2) / np.mean(behind_allreduce**2)) for name, x in steps.items()}
    assert length["gossip"] == pytest.approx(1, abs=0.12)  # each element of the other has a v of its own
    assert length["plain"] < 0.5


def test_one_worker_is_optax_bit_for_bit():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    ours, theirs = cj.gossip_adamw(1e-2, 1, weight_decay=0.1), optax.adamw(1e-2, b2=0.99, weight_decay=0.1)
    states = [ours.init(params), theirs.init(params)]
    for t in range(3):
        grads = jax.tree.map(lambda x, t=t: jnp.sin(x * (t + 1)), params)
        updates = []
        for i, tx in enumerate((ours, theirs)):
            update, states[i] = tx.update(grads, states[i], params)
            updates.append(update)
        jax.tree.map(np.testing.assert_array_equal, *updates)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_the_first_step_is_plain_adams():
    first = noisy(0.0, steps=1, size=100)[0]
    np.testing.assert_allclose(np.abs(run(cj.scale_by_gossip_adam(8), first)[1]), 1, rtol=1e-3)


def test_a_step_that_is_left_out_leaves_no_trace_in_the_signal():
    """A gradient that is not finite: what comes after is as if it had not been, but for the count."""
    algorithm = cj.mix_after(cj.gossip_adamw(0.1, 8, weight_decay=0.0), cj.chain())
    params, state = {"w": jnp.ones(4)}, algorithm.init({"w": jnp.ones(4)})
    for t, g in enumerate([1.0, 2.0, np.nan, 0.5]):
        before = state
        params, state = algorithm.update({"w": jnp.full(4, g)}, state, params, t)
        if np.isnan(g):
            kept = [x for x in jax.tree.leaves(before) if jnp.issubdtype(x.dtype, jnp.floating)]
            now = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
            jax.tree.map(np.testing.assert_array_equal, now, kept)
    assert np.isfinite(params["w"]).all()


def test_clipping_noise_at_zero_biases_each_element_upwards_and_hardly_a_leaf():
    """Why q is summed. Of noise alone v'/v is 1/n; per element it is 1 + 0.4 (n − 1) √((1 − β)/(1 + β)) of that."""
    n, beta = 8, 0.99
    g = np.random.default_rng(0).normal(size=(800, 10_000))
    q = np.zeros(10_000)
    for before, now in itertools.pairwise(g):
        q = beta * q + (1 - beta) * before * now
    each = 1 / n + (1 - 1 / n) * np.clip(q, 0, 1).mean()
    assert each * n == pytest.approx(1 + 0.4 * (n - 1) * np.sqrt((1 - beta) / (1 + beta)), rel=0.03)
    assert second_moment(cj.scale_by_gossip_adam(n, b2=beta, eps=0.0), noisy(0.0, workers=1)[0]).mean() * n < 1.06


def test_a_gradient_that_flips_its_sign_at_every_step_is_taken_for_noise():
    """At the edge of stability: as the docstring says, v' is v / n, and steps are √n too long."""
    flipping = np.tile(np.float32([[1.0], [-1.0]]), (100, 50))
    plain, ours = (run(cj.scale_by_gossip_adam(n, b2=0.99, eps=0.0), flipping)[1][-1] for n in (1, 16))
    np.testing.assert_allclose(ours / plain, 4, rtol=1e-3)


def test_private_data_is_no_noise_that_averages_out():
    """Where gradients of workers differ for good, v' is that of one worker: a wrong moment, as the docstring says."""
    own = np.random.default_rng(2).normal(size=(WORKERS, 1, 2000)) * 3
    gradients = noisy(0.1, size=2000, seed=3) + own
    found = second_moment(cj.scale_by_gossip_adam(WORKERS, b2=0.99, eps=0.0), gradients[0]).mean()
    right = np.mean(gradients.mean(0)[-100:] ** 2)
    assert found > 5 * right


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match=r"`num_workers` must be at least 1, got 0\."):
        cj.gossip_adamw(1e-3, 0)


def test_an_all_reduce_of_all_workers_refuses_it():
    """Its optimizer sees the average gradient, of which v' is too small; inside a group that gossips it is right."""
    params = {"w": jnp.ones(4)}
    behind = optax.chain(optax.clip(1.0), optax.masked(cj.gossip_adamw(1e-3, WORKERS), {"w": True}))
    with pytest.raises(ValueError, match=r"`optimizer` must take the average gradient, .*: use `optax\.adamw`\."):
        cj.allreduce_sgd(behind).init(params)
    for allowed in (
        cj.allreduce_sgd(behind, "fast"),
        cj.allreduce_sgd(cj.gossip_adamw(1e-3, 1)),
        cj.mix_after(behind, cj.average()),
    ):
        allowed.init(params)


def test_the_gradient_before_is_no_momentum_that_travels():
    """x, m and v are mixed by the matrices, the gradient before and its product stay a worker's own; five steps."""
    n, rate, b1, b2 = WORKERS, 0.1, 0.8, 0.95
    pool, cut, table = cj.topology.latin(n, 4, seed=1), cj.by_size(4, align=1), cj.topology.shuffle(4, 4, seed=3)
    mix = cj.gossip(pool, cut, table)
    algorithm = cj.mix_with_momentum(cj.gossip_adamw(rate, n, b1, b2, eps=0.0, weight_decay=0.0), mix)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, n, 3, 4)) + 0.5
    with jax.enable_x64(True):
        x = {"w": jnp.zeros((n, 3, 4))}
        state = jax.vmap(algorithm.init)(x)
        step = cj.per_worker(lambda s, g, t: algorithm.update(g, s[1], s[0], t), n, replicated=(2,))
        for t, g in enumerate(gradients):
            x, state = step((x, state), {"w": jnp.asarray(g)}, jnp.int32(t))
    found = jax.device_get(x["w"])
    x = m = v = np.zeros((n, 3, 4))
    signal = np.zeros(n)
    for t, g in enumerate(gradients):
        if t:
            signal = b2 * signal + (1 - b2) * np.sum(g * gradients[t - 1], (1, 2))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        r = np.clip(signal / (1 - b2**t) / v_hat.sum((1, 2)), 0, 1) if t else np.ones(n)
        x = x - rate * m_hat / np.sqrt(v_hat * (1 / n + (1 - 1 / n) * r[:, None, None]))
        x, m, v = (mixed_by_matrices({"w": y}, t, pool, cut, table)["w"] for y in (x, m, v))
    np.testing.assert_allclose(found, x, rtol=1e-6)

    params = {"w": jnp.zeros((30, 40))}
    update = lambda s, x: algorithm.update(x, s, x, 0)
    sent = wire_bytes(update, jax.eval_shape(algorithm.init, params), params, num_workers=n)
    assert sent == 3 * wire_bytes(lambda x: mix(x, 0), params, num_workers=n)
