"""Outer steps against numpy, and a period of steps against single ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from experiments.compiled import collectives
from tests.oracles import mixed_by_matrices

WORKERS, EVERY = 8, 4
CUT = cj.by_size(4, align=1)
POOL = cj.topology.latin(WORKERS, 4, seed=1)
TABLE = cj.topology.shuffle(4, 4, seed=3)
SHAPES = {"a": (3, 5), "b": (7,)}


def mesh():
    return cj.make_mesh(WORKERS, devices=jax.devices()[:WORKERS])


def gossip(table=TABLE, **options):
    return cj.gossip(POOL, CUT, table, **options)


def everywhere(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(WORKERS, *shape)) for name, shape in SHAPES.items()}


def gradients(t):
    return everywhere(100 + t)


def over(function, *trees):
    return jax.tree.map(function, *trees)


class Nesterov:
    """u of a gradient d by Nesterov's momentum: m <- μ m + d, u = −η (d + μ m)."""

    def __init__(self, rate, momentum):
        self.rate, self.momentum, self.m = rate, momentum, None

    def __call__(self, d):
        self.m = d if self.m is None else over(lambda m, d: self.momentum * m + d, self.m, d)
        return over(lambda m, d: -self.rate * (d + self.momentum * m), self.m, d)


def averaged(tree, count):
    return over(lambda x: np.broadcast_to(x.mean(0), x.shape), tree)


def gossiped(tree, count, table=TABLE):
    return mixed_by_matrices(tree, count, POOL, CUT, table)


def numpy_run(mix, u, *, overlap, steps, rate=0.1, every=EVERY):
    """Inner SGD; after each `every` steps φ <- W(φ + u) or W φ + u. What the parameters are after each step."""
    slow = fast = everywhere()
    slow = fast = over(lambda x: np.broadcast_to(x[:1], x.shape) + 0 * x, slow) if u is not None else slow
    seen = []
    for t in range(steps):
        fast = over(lambda x, g: x - rate * g, fast, gradients(t))
        if t % every == every - 1:
            delta = over(np.subtract, slow, fast)
            updates = over(np.negative, delta) if u is None else u(delta)
            if overlap:
                slow = over(np.add, mix(slow, t // every), updates)
            else:
                slow = mix(over(np.add, slow, updates), t // every)
            fast = slow
        seen.append(fast)
    return seen


def start(algorithm, same, workers):
    params = everywhere()
    params = over(lambda x: np.broadcast_to(x[:1], x.shape) + 0 * x, params) if same else params
    params = over(jnp.asarray, params)
    state = (params, jax.vmap(algorithm.init)(params))
    return state if isinstance(workers, int) else jax.device_put(state, NamedSharding(workers, P("worker")))


def run_singly(algorithm, workers, steps, *, same):
    def step(state, grads, t):
        return algorithm.update(grads, state[1], state[0], t)

    one, state, seen = cj.per_worker(step, workers, replicated=(2,)), start(algorithm, same, workers), []
    for t in range(steps):
        state = one(state, over(jnp.asarray, gradients(t)), jnp.int32(t))
        seen.append(jax.device_get(state[0]))
    return seen, jax.device_get(state)


def run_by_periods(algorithm, workers, steps, *, same, length=EVERY):
    def step(state, grads, t):
        new = algorithm.update(grads, state[1], state[0], t)
        return new, new[0]

    one, state, seen = cj.per_worker(cj.period(step, length), workers, replicated=(2,)), None, []
    state = start(algorithm, same, workers)
    for t in range(0, steps, length):
        batches = over(lambda *x: np.stack(x, 1), *[gradients(t + i) for i in range(length)])
        state, params = one(state, over(jnp.asarray, batches), jnp.int32(t))
        seen += [over(lambda x: x[:, i], jax.device_get(params)) for i in range(length)]
    return seen, jax.device_get(state)


def assert_alike(a, b, tolerance):
    over(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


NESTEROV = (0.7, 0.9)
BOTH = [(run_singly, "simulated"), (run_by_periods, "mesh")]


def of(mix, *, nesterov=NESTEROV, every=EVERY, **options):
    tx = None if nesterov is None else optax.sgd(nesterov[0], momentum=nesterov[1], nesterov=True)
    return cj.outer(optax.sgd(0.1), tx, mix, every=every, **options)


@pytest.mark.parametrize(("run", "where"), BOTH)
def test_average_and_nesterov_are_diloco(run, where):
    """Δ̄ the average of φ − θ, one momentum and one φ for all, as in the paper; five periods in float64."""
    with jax.enable_x64(True):
        seen, _ = run(of(cj.average()), WORKERS if where == "simulated" else mesh(), 5 * EVERY, same=True)
    slow = over(lambda x: x[0], everywhere())
    u = Nesterov(*NESTEROV)
    for period in range(5):
        fast = [slow] * WORKERS
        for t in range(period * EVERY, (period + 1) * EVERY):
            fast = [over(lambda x, g: x - 0.1 * g[i], fast[i], gradients(t)) for i in range(WORKERS)]
        pseudo_gradient = over(lambda x, *of_workers: x - np.mean(of_workers, 0), slow, *fast)
        slow = over(np.add, slow, u(pseudo_gradient))
        assert_alike(seen[period * EVERY + EVERY - 1], over(lambda x: np.broadcast_to(x, (8, *x.shape)), slow), 1e-6)


@pytest.mark.parametrize(("run", "where"), BOTH)
@pytest.mark.parametrize("nesterov", [None, NESTEROV])
@pytest.mark.parametrize("overlap", [False, True])
def test_gossip_outer_steps_are_what_numpy_makes_of_the_matrices(run, where, nesterov, overlap):
    """Single steps and periods; with overlap x <- z + (W y − y), y what a period began with, z what it has become."""
    with jax.enable_x64(True):
        algorithm = of(gossip(), nesterov=nesterov, overlap=overlap)
        seen, _ = run(algorithm, WORKERS if where == "simulated" else mesh(), 2 * EVERY, same=nesterov is not None)
    u = None if nesterov is None else Nesterov(*nesterov)
    expected = numpy_run(gossiped, u, overlap=overlap, steps=2 * EVERY)
    for got, right in zip(seen, expected, strict=True):
        assert_alike(got, right, 1e-9)


def test_the_mean_over_workers_moves_by_the_mean_outer_step():
    pools = {"latin": POOL, "exponential": cj.topology.exponential(8), "balanced": cj.topology.balanced(8, 4, seed=1)}
    for pool in pools.values():
        mix = cj.gossip(pool, cj.whole(), cj.topology.cycle)
        with jax.enable_x64(True):
            seen, _ = run_singly(of(mix), WORKERS, 2 * EVERY, same=True)
            alone, _ = run_singly(of(cj.chain()), WORKERS, 2 * EVERY, same=True)
        for got, right in zip(seen, alone, strict=True):
            assert_alike(over(lambda x: x.mean(0), got), over(lambda x: x.mean(0), right), 1e-12)


@pytest.mark.parametrize("overlap", [False, True])
def test_streamed_segments_take_their_outer_step_each_at_its_own_phase(overlap):
    """Per element: those of a segment that travels take the step, with their own momentum; others go on as they are."""
    table = cj.topology.stream(4, 4, every=4)
    with jax.enable_x64(True):
        seen, _ = run_singly(of(gossip(table), every=1, overlap=overlap), WORKERS, 12, same=True)
    segment = CUT.segment_of(over(lambda x: x[0], everywhere()))
    slow = fast = over(lambda x: np.broadcast_to(x[:1], x.shape) + 0 * x, everywhere())
    momentum = over(np.zeros_like, slow)
    for t in range(12):
        fast = over(lambda x, g: x - 0.1 * g, fast, gradients(t))
        here = over(lambda s, x: np.broadcast_to((table[t] >= 0)[s], x.shape), segment, slow)
        delta = over(np.subtract, slow, fast)
        momentum = over(lambda h, m, d: np.where(h, 0.9 * m + d, m), here, momentum, delta)
        u = over(lambda m, d: -0.7 * (d + 0.9 * m), momentum, delta)
        mixed = over(np.add, gossiped(slow, t, table), u) if overlap else gossiped(over(np.add, slow, u), t, table)
        slow, fast = (over(np.where, here, mixed, old) for old in (slow, fast))
        assert_alike(seen[t], fast, 1e-9)


def test_leaves_that_do_not_travel_take_no_outer_step():
    with jax.enable_x64(True):
        algorithm = of(gossip(leaves=lambda name: name == "a"))
        seen, (_, state) = run_singly(algorithm, WORKERS, EVERY, same=True)
        whole, _ = run_singly(of(gossip()), WORKERS, EVERY, same=True)
        alone, _ = run_singly(cj.mix_after(optax.sgd(0.1), cj.chain()), WORKERS, EVERY, same=True)
    assert_alike(seen[-1]["b"], alone[-1]["b"], 0)
    assert np.abs(seen[-1]["b"] - whole[-1]["b"]).max() > 1e-3
    assert [x.shape[1:] for x in jax.tree.leaves(state.slow)] == [SHAPES["a"]]  # and nothing is kept of them


def test_an_outer_step_that_is_not_finite_is_left_out_and_poisons_nobody():
    algorithm = cj.outer(optax.sgd(1.0), optax.scale(-1e300), cj.average(), every=1)
    x = jnp.ones(4)
    grads = jnp.array([0.0, 0.0, 0.0, 1e30])
    update = jax.vmap(algorithm.update, in_axes=(0, 0, 0, None), axis_name="worker")
    after, _ = update(grads, jax.vmap(algorithm.init)(x), x, 0)
    assert after.tolist() == [1.0] * 4


def test_a_period_is_so_many_single_steps_of_an_algorithm_that_mixes_at_every_one():
    """Also of one that exchanges twice in a period, and of one that does so every second period."""
    algorithms = [
        cj.mix_after(optax.adam(0.1), gossip()),
        cj.mix_during(optax.sgd(0.1, momentum=0.9), gossip()),
        cj.local_sgd(optax.sgd(0.1), 2),
        cj.mix_after(optax.sgd(0.1), cj.every(8, gossip())),
        cj.local_sgd(optax.sgd(0.1), 4),
    ]
    for algorithm in algorithms:
        with jax.enable_x64(True):
            singly, state = run_singly(algorithm, WORKERS, 16, same=True)
            periods, state_too = run_by_periods(algorithm, mesh(), 16, same=True)
        for a, b in zip(singly, periods, strict=True):
            assert_alike(a, b, 1e-9)
        assert_alike(state, state_too, 1e-9)


def lowered(algorithm, length, workers):
    def step(state, grads, t):
        return algorithm.update(grads, state[1], state[0], t), t

    state, grads = start(algorithm, True, workers), over(lambda x: np.stack([x] * length, 1), everywhere())
    return cj.per_worker(cj.period(step, length), workers, replicated=(2,)).lower(state, grads, jnp.int32(0))


@pytest.mark.full_compilation
def test_a_period_has_no_conditional_and_one_exchange():
    found = collectives(lowered(of(gossip()), EVERY, mesh()).compile().as_text())
    assert found == {"collective-permute": 4}
    assert "conditional" in collectives(lowered(of(gossip()), EVERY - 1, mesh()).compile().as_text())


def test_the_numbers_of_steps_outputs_and_keys_are_those_of_single_steps():
    def step(state, batch, t):
        drawn = jax.random.normal(jax.random.fold_in(jax.random.key(0), t))
        return state + drawn * batch, (t, drawn)

    batches = jnp.ones((WORKERS, 3))
    state, (numbers, drawn) = cj.per_worker(cj.period(step, 3), WORKERS, replicated=(2,))(
        jnp.zeros(WORKERS), batches, jnp.int32(6)
    )
    assert numbers.tolist() == [[6, 7, 8]] * WORKERS
    right = [jax.random.normal(jax.random.fold_in(jax.random.key(0), t)) for t in (6, 7, 8)]
    np.testing.assert_allclose(drawn[2], right, rtol=1e-6)
    np.testing.assert_allclose(state, sum(right), rtol=1e-5)


def test_as_optax_takes_the_step_of_a_period():
    """An unchanged loop around `as_optax` differs from the algorithm by nothing."""
    algorithm = of(gossip())
    tx = cj.as_optax(algorithm)

    def step(state, grads, t):
        updates, opt_state = tx.update(grads, state[1], state[0], step=t)
        params = optax.apply_updates(state[0], updates)
        return (params, opt_state), params

    state = start(cj.Algorithm(tx.init, None), True, WORKERS)
    batches = over(lambda *x: jnp.asarray(np.stack(x, 1), jnp.float32), *[gradients(i) for i in range(EVERY)])
    state = over(lambda x: jnp.asarray(x, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    (_, state), seen = cj.per_worker(cj.period(step, EVERY), WORKERS, replicated=(2,))(state, batches, jnp.int32(0))
    right = numpy_run(gossiped, Nesterov(*NESTEROV), overlap=False, steps=EVERY)
    assert_alike(over(lambda x: x[:, -1], seen), right[-1], 1e-5)
    assert np.asarray(state.count).tolist() == [EVERY] * WORKERS


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"`every` must be at least 1, got 0\."):
        cj.outer(optax.sgd(0.1), None, cj.average(), every=0)
    with pytest.raises(ValueError, match="`inner` must train its parameters as they are"):
        cj.outer(cj.sgp(optax.sgd(0.1), 8, pool=cj.topology.pull(8, 2).transpose()), None, cj.average(), every=2)
    with pytest.raises(ValueError, match=r"`length` must be at least 1, got 0\."):
        cj.period(lambda *args: args, 0)
    run = cj.per_worker(cj.period(lambda state, batch, t: (state, batch), 3), 4, replicated=(2,))
    with pytest.raises(ValueError, match=r"`batches` must hold `length` = 3 batches, got a leaf of shape \(2,\)"):
        run(jnp.zeros(4), jnp.zeros((4, 2)), 0)
    with pytest.raises(ValueError, match=r"`first` must be a multiple of `length` = 3, got 4\."):
        cj.period(lambda state, batch, t: (state, batch), 3)(jnp.zeros(4), jnp.zeros(3), 4)
