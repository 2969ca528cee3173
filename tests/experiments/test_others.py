"""Algorithms and optimizers of others against their equations in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from experiments import data, others
from experiments.configs import lm
from experiments.optimizers import make_optimizer, scale_by_oracle_adam
from experiments.program import make_program, wire_bytes_per_step
from experiments.settings import check_settings
from tests.experiments.helpers import changed
from tests.oracles import mixed_by_matrices

WORKERS, EVERY = 8, 3
SHAPES = {"a": (3, 5), "b": (7,)}
PAIRS = others.pairs(WORKERS, 4, seed=1)
LATIN, CUT, TABLE = cj.topology.latin(WORKERS, 4, seed=1), cj.by_size(4, align=1), cj.topology.shuffle(4, 4, seed=3)
PLACES = ["simulated", "mesh"]


def everywhere(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(WORKERS, *shape)) for name, shape in SHAPES.items()}


def over(function, *trees):
    return jax.tree.map(function, *trees)


def first():
    """The same on all workers."""
    return over(lambda x: np.broadcast_to(x[:1], x.shape) + 0 * x, everywhere(0))


def run(algorithm, place, steps, length=1):
    """The parameters behind each step, or each period of `length` steps, and the last state."""
    where = WORKERS if place == "simulated" else cj.make_mesh(WORKERS, devices=jax.devices()[:WORKERS])

    def step(state, grads, t):
        return algorithm.update(grads, state[1], state[0], t), None

    params = over(jnp.asarray, first())
    state = (params, jax.vmap(algorithm.init)(params))
    state = state if place == "simulated" else jax.device_put(state, NamedSharding(where, P("worker")))
    whole, seen = cj.per_worker(cj.period(step, length), where, replicated=(2,)), []
    for t in range(0, steps, length):
        batches = over(lambda *x: jnp.asarray(np.stack(x, 1)), *[everywhere(100 + t + i) for i in range(length)])
        state, _ = whole(state, batches, jnp.int32(t))
        seen.append(jax.device_get(state[0]))
    return seen, jax.device_get(state[1])


def assert_alike(a, b):
    over(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), a, b)


def pair_means(tree, count):
    return over(lambda x: PAIRS.apply(count % 4, x), tree)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("length", [1, EVERY])
def test_noloco_is_its_equation(place, length):
    """m <- μ m − η WΔ + η (Wφ − φ), φ <- φ + m, over five periods, of which one takes the first pairs again."""
    mix = cj.gossip(PAIRS, cj.whole(), cj.topology.cycle)
    with jax.enable_x64(True):
        algorithm = others.noloco(optax.sgd(0.1), mix, EVERY, learning_rate=0.7, momentum=0.5)
        seen, _ = run(algorithm, place, 5 * EVERY, length)
    slow = fast = first()
    m = over(np.zeros_like, slow)
    expected = []
    for t in range(5 * EVERY):
        fast = over(lambda x, g: x - 0.1 * g, fast, everywhere(100 + t))
        if t % EVERY == EVERY - 1:
            delta = pair_means(over(np.subtract, slow, fast), t // EVERY)
            pulled = over(np.subtract, pair_means(slow, t // EVERY), slow)
            m = over(lambda m, d, w: 0.5 * m - 0.7 * d + 0.7 * w, m, delta, pulled)
            slow = fast = over(np.add, slow, m)
        expected.append(fast)
    for got, right in zip(seen, expected[length - 1 :: length], strict=True):
        assert_alike(got, right)


def test_pairs_hear_each_other_and_change():
    for p in range(PAIRS.num_rounds):
        W = PAIRS.matrix(p)
        np.testing.assert_array_equal(W, W.T)
        np.testing.assert_array_equal(np.sort(W, axis=1)[:, -3:], [[0, 0.5, 0.5]] * WORKERS)
    assert len({PAIRS.matrix(p).tobytes() for p in range(4)}) == 4
    with pytest.raises(ValueError, match=r"`num_workers` must be even for pairs, got 7\."):
        others.pairs(7, 4)


@pytest.mark.parametrize("place", PLACES)
def test_moments_travel_each_on_its_own_clock(place):
    """Adam by numpy; x at every second step, m at every third exchange and v at every sixth, for two rounds of that."""
    steps, rate, b1, b2 = 24, 0.1, 0.8, 0.9
    with jax.enable_x64(True):
        algorithm = others.des_loc(optax.adam(rate, b1, b2, eps=0.0), cj.gossip(LATIN, CUT, TABLE), 2, 3, 6)
        seen, (state, _) = run(algorithm, place, steps)
    x = first()
    m = v = over(np.zeros_like, x)
    for t in range(steps):
        g = everywhere(100 + t)
        m, v = over(lambda m, g: b1 * m + (1 - b1) * g, m, g), over(lambda v, g: b2 * v + (1 - b2) * g**2, v, g)
        m_scale, v_scale = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        x = over(lambda x, m, v: x - rate * (m / m_scale) / np.sqrt(v / v_scale), x, m, v)
        count, is_due = divmod(t + 1, 2)
        count -= 1  # exchanges before this one
        if is_due == 0:
            x = mixed_by_matrices(x, count, LATIN, CUT, TABLE)
            m = mixed_by_matrices(m, count // 3, LATIN, CUT, TABLE) if count % 3 == 2 else m
            v = mixed_by_matrices(v, count // 6, LATIN, CUT, TABLE) if count % 6 == 5 else v
        assert_alike(seen[t], x)
    assert_alike(state.mu, m)
    assert_alike(state.nu, v)


def test_an_optimizer_without_moments_has_no_clocks():
    algorithm = others.des_loc(optax.sgd(0.1, momentum=0.9), cj.average(), 1, 3, 6)
    with pytest.raises(ValueError, match="`optimizer` must keep `mu` and `nu`, as AdamW does, got one without mu"):
        algorithm.init(jnp.zeros(3))


@pytest.mark.parametrize(
    ("algorithm", "own", "models"),
    [
        ("noloco", {"noloco.every": 16}, 2 / 16),
        ("des_loc", {}, 1 + 1 / 3 + 1 / 6),
        ("des_loc", {"des_loc.rounds": 2, "des_loc.wire": "int8"}, 2 * 0.254 * 1.5),
    ],
)
def test_bytes_per_step_are_those_of_the_equations(algorithm, own, models):
    config = changed(lm.get_config(), algorithm=algorithm, crossover__rounds=1, crossover__wire=None)
    config.update_from_flattened_dict(own)
    check_settings(config)
    program = make_program(config, data.describe("text", sequence=64), 8, 10)
    sent = wire_bytes_per_step(program.algorithm, program.shapes.params, config)
    assert sent == pytest.approx(models * 4 * 151_872, rel=2e-3)


# ---- The oracle of gossip_adamw ----


@pytest.mark.parametrize("place", PLACES)
def test_the_oracle_divides_by_the_second_moment_of_the_average_gradient(place):
    steps, rate, b1, b2 = 5, 0.1, 0.8, 0.9
    with jax.enable_x64(True):
        optimizer = optax.chain(scale_by_oracle_adam(b1, b2, eps=0.0), optax.scale(-rate))
        seen, _ = run(cj.mix_after(optimizer, cj.gossip(LATIN, CUT, TABLE)), place, steps)
    x = first()
    m = v = over(np.zeros_like, x)
    for t in range(steps):
        g = everywhere(100 + t)
        m = over(lambda m, g: b1 * m + (1 - b1) * g, m, g)
        v = over(lambda v, g: b2 * v + (1 - b2) * g.mean(0) ** 2, v, g)
        m_scale, v_scale = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        x = over(lambda x, m, v: x - rate * (m / m_scale) / np.sqrt(v / v_scale), x, m, v)
        x = mixed_by_matrices(x, t, LATIN, CUT, TABLE)
        assert_alike(seen[t], x)


# ---- Muon ----


def first_muon_step(params, grads):
    config = changed(lm.get_config(), optimizer="muon", clip_norm=None, adamw__b2=0.95, adamw__weight_decay=5e-4)
    config.update_from_flattened_dict({"schedule.warmup": 0.0, "schedule.learning_rate": 0.5, "muon.weight_decay": 0.1})
    check_settings(config)
    tx = make_optimizer(config, 10)
    return tx.update(grads, tx.init(params), params)[0]


def orthogonalised(g):
    """Newton and Schulz' iteration of the reference, on the singular values of a matrix."""
    u, s, v = np.linalg.svd(g, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("heads_first", [False, True])
def test_muon_orthogonalises_each_matrix_of_the_layers_and_adam_has_the_rest(heads_first):
    """Both with AdamW's learning rate and decay: a matrix of a × b has steps of 0.2 √max(a, b) of it."""
    rng = np.random.default_rng(0)
    name, shape = ("out", (2, 4, 8, 24)) if heads_first else ("query", (2, 24, 4, 8))  # heads are two axes
    shapes = {"embedding": (10, 24), "layers": {name: shape, "norm": (2, 24)}, "norm": (24,)}
    draw = lambda: jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )
    params, grads = draw(), draw()
    update = first_muon_step(params, grads)
    rows, columns = (32, 24) if heads_first else (24, 32)
    for layer in range(2):
        g, x, u = (tree["layers"][name][layer].reshape(rows, columns) for tree in (grads, params, update))
        expected = -0.5 * (0.2 * np.sqrt(32) * orthogonalised(g) + 0.1 * x)
        np.testing.assert_allclose(u, expected, rtol=1e-3, atol=1e-4)
    first_adam = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # with Nesterov's momentum, as optax has it there
    expected = -0.5 * (first_adam * np.sign(grads["embedding"]) + 0.1 * params["embedding"])
    np.testing.assert_allclose(update["embedding"], expected, rtol=1e-4, atol=1e-4)
    for own, g in ((update["norm"], grads["norm"]), (update["layers"]["norm"], grads["layers"]["norm"])):
        np.testing.assert_allclose(own, -0.5 * first_adam * np.sign(g), rtol=1e-4)
