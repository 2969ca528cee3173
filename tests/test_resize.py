from fractions import Fraction
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax.push_sum import PushSumState

SIZES = [(8, 4), (4, 8), (8, 1), (1, 8), (8, 6), (6, 8), (8, 8), (7, 3)]
MATRICES = {"overlap": cj.overlap_matrix, "average": cj.average_matrix}
pairs = pytest.mark.parametrize(("n", "m"), SIZES)
kinds = pytest.mark.parametrize("kind", MATRICES)


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pairs
def test_overlap_is_the_exact_measure_of_intersections_of_intervals(n, m):
    def share(j, i):
        begin, end = max(Fraction(j, m), Fraction(i, n)), min(Fraction(j + 1, m), Fraction(i + 1, n))
        return float(m * max(end - begin, Fraction(0)))

    np.testing.assert_array_equal(cj.overlap_matrix(n, m), [[share(j, i) for i in range(n)] for j in range(m)])
    np.testing.assert_array_equal(cj.average_matrix(n, m), np.full((m, n), 1 / n))


@pairs
@kinds
def test_rows_sum_to_one_and_columns_to_m_over_n(kind, n, m):
    matrix = MATRICES[kind](n, m)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-15)
    np.testing.assert_allclose(matrix.sum(0), m / n, rtol=1e-15)


def test_overlap_averages_neighbours_copies_or_changes_nothing():
    np.testing.assert_array_equal(cj.overlap_matrix(8, 4), np.kron(np.eye(4), [[0.5, 0.5]]))
    np.testing.assert_array_equal(cj.overlap_matrix(4, 8), np.kron(np.eye(4), [[1], [1]]))
    np.testing.assert_array_equal(cj.overlap_matrix(8, 8), np.eye(8))


@pairs
@kinds
def test_floating_point_leaves_are_multiplied_by_the_matrix_and_keep_their_mean(kind, n, m):
    matrix = MATRICES[kind](n, m)
    x, z = normal(n, 3, 5), normal(n, 2, seed=1) + 1j * normal(n, 2, seed=2)
    low = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    state = {"x": jnp.asarray(x), "low": jnp.asarray(x, jnp.bfloat16), "z": jnp.asarray(z, jnp.complex64)}
    resized = cj.resize(state, matrix)
    assert jax.tree.map(lambda x: x.dtype, resized) == jax.tree.map(lambda x: x.dtype, state)
    for name, before, eps in [("x", x, 1e-6), ("low", low, 2.0**-8), ("z", z, 1e-6)]:
        after = np.asarray(resized[name].astype(complex))
        np.testing.assert_allclose(after, np.tensordot(matrix, before.astype(complex), 1), rtol=eps, atol=eps)
        np.testing.assert_allclose(after.mean(0), before.astype(complex).mean(0), rtol=eps, atol=eps)


def test_bfloat16_is_averaged_in_float32_and_rounded_once():
    x = np.random.default_rng(0).integers(-256, 256, (8, 100))  # bfloat16 holds them, and float32 their averages
    resized = cj.resize(jnp.asarray(x, jnp.bfloat16), cj.average_matrix(8, 2))
    np.testing.assert_array_equal(resized, jnp.asarray(np.tile(x.mean(0), (2, 1)), jnp.bfloat16))


@pairs
@kinds
def test_workers_that_are_equal_stay_equal_in_every_bit(kind, n, m):
    one = np.array([*normal(61), -0.0, 0.0, np.inf, -np.inf, 1e-30], np.float32)
    one = {"wide": jnp.asarray(one), "narrow": jnp.asarray(one, jnp.bfloat16)}
    resized = cj.resize(cj.copies(one, n), MATRICES[kind](n, m))
    jax.tree.map(lambda y, x: np.testing.assert_array_equal(bits(y), np.tile(bits(x), (m, 1))), resized, one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_with_a_single_one_copies_the_bits_of_its_worker(dtype):
    x = np.array(jnp.asarray(normal(6, 64), dtype))
    x[:, :4] = [-0.0, np.inf, np.nan, 1e-42]
    x[2, :4] = [0.0, 1.0, 2.0, 3.0]
    for matrix in (cj.overlap_matrix(6, 6), np.eye(6)[[3, 3, 0, 5]], cj.overlap_matrix(6, 12)):
        expected = bits(x)[matrix.argmax(1)]
        np.testing.assert_array_equal(bits(cj.resize(jnp.asarray(x), matrix)), expected)
    matrix = cj.overlap_matrix(6, 8)  # of six, the first and last worker of each three are also copied
    copied = matrix.max(1) == 1
    assert copied.tolist() == [True, False, False, True] * 2
    resized = cj.resize(jnp.asarray(x), matrix)
    np.testing.assert_array_equal(bits(resized)[copied], bits(x)[matrix[copied].argmax(1)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_worker_that_diverged_spoils_only_those_that_are_made_of_it(value):
    x, matrix = normal(8, 3), cj.overlap_matrix(8, 6)
    x[0] = value
    finite = np.isfinite(cj.resize(jnp.asarray(x), matrix))
    np.testing.assert_array_equal(finite, np.tile(matrix[:, :1] == 0, 3))


def test_counters_become_the_highest_and_what_cannot_be_averaged_is_its_own_workers():
    """A worker that skipped a step counts one less for ever: it catches up, and nothing is refused."""
    count = jnp.full(8, 7).at[2].set(6)
    table, flag = jnp.arange(24).reshape(8, 3), jnp.ones(8, bool).at[2].set(False)
    state = {
        "opt": {"count": count, "mu": jnp.arange(8.0)},
        "table": table,
        "flag": flag,
        "none": jnp.zeros((8, 0), int),
    }
    for matrix in (cj.overlap_matrix(8, 3), cj.overlap_matrix(8, 16), cj.average_matrix(8, 2)):
        resized, m = cj.resize(state, matrix), len(matrix)
        largest = matrix.argmax(1)
        np.testing.assert_array_equal(resized["opt"]["count"], np.full(m, 7))
        np.testing.assert_allclose(resized["opt"]["mu"], matrix @ np.arange(8.0), rtol=1e-6)
        np.testing.assert_array_equal(resized["table"], np.asarray(table)[largest])
        np.testing.assert_array_equal(resized["flag"], np.asarray(flag)[largest])
        assert resized["none"].shape == (m, 0)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("m", [3, 8, 16])
def test_random_keys_stay_different_on_any_number_of_workers(make, m):
    keys = cj.copies({"key": make(1)}, 8)
    matrix = cj.overlap_matrix(8, m)
    resized = cj.resize(keys, matrix)["key"]
    raw = [np.asarray(jax.random.key_data(k) if make is jax.random.key else k) for k in (keys["key"], resized)]
    assert len(np.unique(raw[1], axis=0)) == m
    first = np.unique(matrix.argmax(1), return_index=True)[1]  # of several from one worker the first keeps its key
    np.testing.assert_array_equal(raw[1][first], raw[0][matrix.argmax(1)[first]])


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="`n` must be at least 1 worker, got 0: pass"):
        cj.overlap_matrix(0, 4)
    with pytest.raises(ValueError, match="`m` must be at least 1 worker, got -1: pass"):
        cj.average_matrix(4, -1)
    matrix = cj.overlap_matrix(8, 4)
    for shape in [(4,), (), (16, 2)]:
        with pytest.raises(ValueError, match=r"leaf 'a/w' must have a leading axis of 8 workers, the columns of `mat"):
            cj.resize({"a": {"w": jnp.zeros(shape)}, "b": jnp.zeros(8)}, matrix)
    for wrong, got in [
        (matrix.T, r"sums \["),
        (matrix * np.nan, "sums"),
        (matrix[0], r"shape \(8,\)"),
        (matrix[:0], r"shape \(0, 8\)"),
    ]:
        with pytest.raises(ValueError, match=rf"`matrix` must be \[m, n\] with rows that sum to 1, got {got}"):
            cj.resize(jnp.zeros(8), wrong)
    with pytest.raises(ValueError, match=r"push-sum weights must be \[n, segments, n\], got \(8, 1, 4\)"):
        cj.resize(PushSumState((), jnp.ones((8, 1, 4))), matrix)


ADAM = optax.adam(1e-2)
TARGETS = normal(8, 9, seed=3)
ALGORITHMS = {
    "sgp": lambda n: cj.sgp(ADAM, n),
    "sgp, pull": lambda n: cj.sgp(ADAM, n, pool=cj.topology.pull(n, 3, seed=5).transpose()),
    "push_sum, pull": lambda n: cj.push_sum(
        ADAM, cj.topology.pull(n, 3, seed=5).transpose(), cj.by_size(3), cj.topology.sample(3, 3, seed=1)
    ),
}


def train(algorithm, state, n, steps):
    def step(params, state, target, t):
        return algorithm.update(algorithm.model(params, state) - target, state, params, t)

    run = cj.per_worker(lambda s, target, t: step(*s, target, t), n, replicated=(2,))
    for t in steps:
        state = run(state, TARGETS[:n], jnp.int32(t))
    return state


@cache
def trained_by_eight(name):
    algorithm, x = ALGORITHMS[name](8), jnp.asarray(normal(8, 9))
    return train(algorithm, (x, cj.copies(algorithm.init(x[0]), 8)), 8, range(5))


@pytest.mark.parametrize(("m", "kind"), [(1, "overlap"), (4, "overlap"), (6, "overlap"), (4, "average")])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_values_and_push_sum_weights_are_resized_together_and_training_goes_on(name, m, kind):
    n, matrix = 8, MATRICES[kind](8, m)
    state = trained_by_eight(name)
    resized = cj.resize(state, matrix)
    np.testing.assert_allclose(resized[0].sum(0), state[0].sum(0) * m / n, rtol=1e-5, atol=1e-5)
    segments = cj.by_size(3) if name == "push_sum, pull" else cj.whole()
    w = np.ones((n, 9))
    if "pull" in name:
        weights, new = np.asarray(state[1].weights, np.float64)[0], resized[1].weights
        assert np.abs(weights - 1).max() > 0.1
        assert new.shape == (m, len(weights), m)
        cj.check_copies(new)
        np.testing.assert_allclose(new[0].sum(1), weights.sum(1) * m / n, rtol=1e-6)
        w = weights[segments.segment_of(np.asarray(state[0][0]))].T
    if m > 1:  # a pull needs a peer
        after = ALGORITHMS[name](m)
        model = jax.vmap(after.model, axis_name="worker")(*resized)
        np.testing.assert_allclose(model, matrix @ np.asarray(state[0], np.float64) / (matrix @ w), rtol=1e-5)
        adam = lambda state: (state.optimizer if "pull" in name else state)[0]
        old, new = adam(state[1]), adam(resized[1])
        np.testing.assert_allclose(new.mu, matrix @ np.asarray(old.mu, np.float64), rtol=1e-5, atol=1e-6)
        assert new.count.tolist() == [5] * m
        shapes = jax.tree.map(jnp.shape, resized)
        resized = train(after, resized, m, [5])
        assert jax.tree.map(jnp.shape, resized) == shapes
        assert adam(resized[1]).count.tolist() == [6] * m
        assert np.isfinite(resized[0]).all()


@kinds
def test_push_sum_workers_that_are_equal_stay_equal_in_model_and_weights(kind):
    algorithm = ALGORITHMS["push_sum, pull"](6)
    weights = jnp.broadcast_to(jnp.asarray([[1.7], [0.3], [1.1]]), (8, 3, 8))
    state = (jnp.tile(jnp.asarray(normal(9)), (8, 1)), PushSumState((), weights))
    x, resized = cj.resize(state, MATRICES[kind](8, 6))
    np.testing.assert_array_equal(resized.weights, np.broadcast_to(weights[:1, :, :1], (6, 3, 6)))
    model = jax.vmap(algorithm.model, axis_name="worker")(x, resized)
    np.testing.assert_array_equal(bits(model), np.tile(bits(model[:1]), (6, 1)))


def test_push_sum_is_found_wherever_it_is_and_whatever_is_inside():
    nested = PushSumState({"mu": jnp.arange(8.0)}, jnp.ones((8, 2, 8)))
    resized = cj.resize({"a": [nested, jnp.arange(8.0)]}, cj.overlap_matrix(8, 4))["a"]
    assert resized[0].weights.shape == (4, 2, 4)
    np.testing.assert_array_equal(resized[0].optimizer["mu"], resized[1])


@pytest.mark.parametrize(
    ("n", "m", "kind"), [(8, 4, "overlap"), (8, 4, "average"), (6, 4, "overlap"), (4, 4, "overlap")]
)
def test_resized_on_a_mesh_it_is_what_it_is_on_the_host_in_every_bit(kind, n, m):
    """From one device per worker, or all workers' elements spread over the devices, to workers of two devices."""
    devices, matrix = jax.devices()[:8], MATRICES[kind](n, m)
    new = cj.make_mesh(m, {"fsdp": 2}, devices=devices)
    algorithm = ALGORITHMS["push_sum, pull"](n)
    specs = {"w": P("fsdp"), "b": P()}
    params = {"w": jnp.asarray(normal(16, 4)), "b": jnp.asarray(normal(4, seed=1), jnp.bfloat16)}
    shapes = (params, jax.eval_shape(algorithm.init, params))
    state = cj.copies((params, algorithm.init(params)), n)
    apart = lambda x: x + jnp.asarray(normal(*x.shape), x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    weights = jnp.broadcast_to(1 + jnp.arange(n) / n, (n, 3, n))
    params_of_workers, state_of_workers = jax.tree.map(apart, state)
    state = params_of_workers, state_of_workers._replace(weights=weights)
    expected = jax.tree.map(np.asarray, cj.resize(state, matrix))
    abstract = cj.abstract_copies(shapes, new, specs=(specs, cj.state_specs(shapes[1], params, specs)))
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    spread = NamedSharding(new, P(None, ("worker", "fsdp"))), NamedSharding(new, P())
    places = [jax.tree.map(lambda x: spread[not (x.ndim > 1 and x.shape[1] % 8 == 0)], state)]
    if n == 8:
        places.append(NamedSharding(cj.make_mesh(8, devices=devices), P("worker")))
    for place in places:
        placed = jax.device_put(state, place)
        resized = jax.jit(partial(cj.resize, matrix=matrix), out_shardings=shardings)(placed)
        assert jax.tree.map(lambda x: x.sharding, resized) == shardings
        for result in (resized, cj.resize(placed, matrix)):
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), result, expected)
