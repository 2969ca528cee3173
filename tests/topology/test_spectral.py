"""Mixing speed: against dense linear algebra, and against the measurements of the authors' topologies."""

import itertools

import numpy as np
import pytest

from crossover_jax.topology import (
    balanced,
    base,
    complete,
    contraction,
    decay,
    derangements,
    effective_neighbors,
    exponential,
    hypercube,
    ideal_contraction,
    latin,
    messages,
    modes,
    product,
    pull,
    ring,
    rounds_until,
    shuffle,
    spectral,
    symmetric,
)

THRESHOLDS = (1e-1, 1e-2, 1e-3)
POOLS = {
    "ring": ring(9),
    "exponential": exponential(12, peers=2),
    "hypercube": hypercube(16),
    "base": base(13, 2),
    "complete": complete(7),
    "latin": latin(20, 4),
    "symmetric": symmetric(24, 5, 4),
    "balanced": balanced(33, 3),
    "pull": pull(17, 3),
    "push": pull(17, 3).transpose(),
    "one worker": latin(1, 1),
    "two workers": derangements(2, 1),
}


def centre(n):
    return np.eye(n) - 1 / n


def in_turn(pool):
    return itertools.cycle(range(pool.num_rounds))


def rounds_to_thresholds(pool):
    return [rounds_until(pool, in_turn(pool), below) for below in THRESHOLDS]


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_contraction_is_that_of_the_dense_matrices(pool):
    n = pool.num_workers
    left = [centre(n) @ pool.matrix(p) @ centre(n) for p in range(pool.num_rounds)]
    squared = np.mean([M.T @ M for M in left], axis=0)
    worst, mean = contraction(pool)
    np.testing.assert_allclose(worst, np.linalg.eigvalsh(squared)[-1], atol=1e-7)
    np.testing.assert_allclose(mean, np.trace(squared) / max(1, n - 1), atol=1e-12)


@pytest.mark.parametrize("peers", [1, 2, 3])
def test_no_direction_can_do_better_than_the_ideal(peers):
    ideal = ideal_contraction(27, peers)
    assert contraction(exponential(27, peers)).mean == pytest.approx(ideal)
    assert ideal_contraction(64) == pytest.approx(0.5 * (1 - 1 / 63))
    assert contraction(latin(27, 26)).worst == pytest.approx(ideal_contraction(27))


def test_contraction_of_sixteen_thousand_workers_needs_no_matrix():
    assert contraction(ring(16384)).worst == pytest.approx((1 / 3 + 2 / 3 * np.cos(2 * np.pi / 16384)) ** 2)
    assert contraction(hypercube(16384)).worst == pytest.approx(1 - 1 / 14)
    shifts = 16384 - latin(16384, 32).receive_from[:, 0, 0]
    cosines = np.cos(2 * np.pi / 16384 * np.outer(np.arange(1, 16384), shifts)).mean(1)
    assert contraction(latin(16384, 32)).worst == pytest.approx(0.5 * (1 + cosines.max()))


# The design's figures are the best of ten, for n = 64.
@pytest.mark.parametrize(("pool_size", "figure"), [(8, 0.711), (16, 0.649), (32, 0.602)])
def test_derangements_contract_as_measured(pool_size, figure):
    best = min(contraction(derangements(64, pool_size, seed)).worst for seed in range(10))
    assert best == pytest.approx(figure, abs=0.012)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_product_is_the_product_of_the_matrices_of_a_tables_column(pool):
    column = np.append(shuffle(3, pool.num_rounds, 9)[:, 1], -1)
    expected = np.eye(pool.num_workers)
    for p in column[:-1]:
        expected = pool.matrix(p) @ expected
    np.testing.assert_allclose(product(pool, column), expected, atol=1e-14)


@pytest.mark.parametrize("dense", [0, 128])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_decay_is_the_norm_of_the_dense_product(pool, dense, monkeypatch):
    monkeypatch.setattr(spectral, "_DENSE", dense)
    rounds = np.append(np.array([0, 1, 2, 1, 0]) % pool.num_rounds, -1)  # a column of a table
    n = pool.num_workers
    for t, left in enumerate(decay(pool, rounds), start=1):
        expected = np.linalg.norm(centre(n) @ product(pool, rounds[:t]) @ centre(n), ord=2)
        np.testing.assert_allclose(left, expected, rtol=1e-4, atol=1e-12)


def test_rounds_that_never_reach_are_none():
    assert rounds_until(ring(64), [0] * 10) is None
    assert rounds_until(latin(1, 1), itertools.repeat(0)) == 1


# Rounds until the second singular value of the product is below 0.1, 0.01, 0.001 (experiments of 2021, recomputed).
SECOND_SINGULAR_VALUE = {
    "one-peer exponential": (
        exponential,
        {8: (3, 3, 3), 16: (4, 4, 4), 64: (6, 6, 6), 256: (8, 8, 8)},
    ),
    "two-peer exponential": (
        lambda n: exponential(n, 2),
        {8: (3, 5, 8), 16: (5, 9, 12), 32: (7, 11, 15), 64: (8, 12, 19), 128: (5, 10, 15), 256: (5, 11, 17)},
    ),
    "three-peer exponential": (
        lambda n: exponential(n, 3),
        {8: (2, 2, 2), 32: (3, 3, 3), 64: (3, 3, 3), 128: (4, 4, 4), 256: (4, 4, 4)},
    ),
    "ring": (ring, {8: (11, 22, 32), 16: (45, 89, 133), 32: (179, 358, 536), 64: (717, 1433, 2149)}),
    "directed ring": (
        lambda n: ring(n, directed=True),
        {8: (30, 59, 88), 16: (119, 238, 357), 32: (478, 955, 1432), 64: (1911, 3821, 5732)},
    ),
}


@pytest.mark.parametrize(("build", "table"), SECOND_SINGULAR_VALUE.values(), ids=SECOND_SINGULAR_VALUE)
def test_graphs_take_as_many_rounds_as_measured(build, table):
    for n, rounds in table.items():
        assert tuple(rounds_to_thresholds(build(n))) == rounds


def test_one_peer_exponential_keeps_disagreement_until_its_last_round():
    left = list(decay(exponential(64), range(6)))
    np.testing.assert_allclose(left, [0.999, 0.994, 0.975, 0.901, 0.637, 0], atol=6e-4)


@pytest.mark.parametrize(
    ("build", "num_workers", "rounds"),
    [
        (balanced, 8, (7.8, 13.0, 18.0)),
        (balanced, 64, (10.5, 17.5, 24.4)),
        (derangements, 8, (7.6, 12.8, 17.9)),
        (derangements, 64, (10.5, 17.6, 24.4)),
        (pull, 8, (7.2, 12.0, 16.8)),
        (pull, 64, (10.8, 17.7, 24.4)),
    ],
)
def test_drawn_pools_take_as_many_rounds_as_measured(build, num_workers, rounds):
    seeds = 40
    needed = []
    for seed in range(seeds):
        pool, state, second = build(num_workers, 40, seed), np.eye(num_workers), []
        for p in range(40):
            state = pool.apply(p, state)
            second.append(np.linalg.svd(state, compute_uv=False)[1])
        needed.append([np.argmax(np.array(second) < below) + 1 for below in THRESHOLDS])
    # Two of 40 and 200 seeds differ by sqrt(1/40 + 1/200) standard deviations; 4 of those, and the last digit.
    tolerance = 4 * np.std(needed, axis=0) * np.sqrt(1 / seeds + 1 / 200) + 0.05
    assert (abs(np.mean(needed, axis=0) - rounds) < tolerance).all()


@pytest.mark.parametrize(("num_workers", "weight"), [(8, 1.34), pytest.param(64, 1.48, marks=pytest.mark.slow)])
def test_without_load_balancing_the_average_moves(num_workers, weight):
    squares = []
    for seed in range(100):
        limit = product(pull(num_workers, 60, seed), range(60))[0]  # whose row holds how much each worker counts
        squares.append(num_workers * (limit @ limit))
    assert np.mean(squares) == pytest.approx(weight, abs=4 * np.std(squares) / 10 + 0.005)
    fair = product(balanced(num_workers, 80), range(80))[0]
    assert num_workers * (fair @ fair) == pytest.approx(1, abs=1e-3)


def variance(pool, gamma, order):
    """Mean variance of x <- W (√γ x + noise), by iterating its covariance; `order` "in turn" averages the phases."""
    n, W = pool.num_workers, [pool.matrix(p) for p in range(pool.num_rounds)]
    covariance, last = np.zeros((n, n)), []
    for t in range(300):
        mixed = [w @ (gamma * covariance + np.eye(n)) @ w.T for w in W]
        covariance = mixed[t % len(W)] if order == "in turn" else np.mean(mixed, axis=0)
        last.append(np.trace(covariance) / n)
    return np.mean(last[-len(W) :])


@pytest.mark.parametrize("order", ["at random", "in turn"])
@pytest.mark.parametrize("name", [name for name in POOLS if name != "push"])
def test_effective_neighbors_are_the_ratio_of_the_variances_of_two_random_walks(name, order):
    pool = POOLS[name]
    for gamma in (0.0, 0.5, 0.9):
        alone = 1 / (1 - gamma)
        expected = alone / variance(pool, gamma, order)
        assert effective_neighbors(pool, gamma, in_turn=order == "in turn") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("in_turn", [False, True])
def test_effective_neighbors_of_many_workers_are_sampled_to_a_percent(in_turn, monkeypatch):
    pool = derangements(100, 8)
    exact = effective_neighbors(pool, 0.95, in_turn=in_turn)
    monkeypatch.setattr(spectral, "_DENSE", 0)
    assert effective_neighbors(pool, 0.95, in_turn=in_turn) == pytest.approx(exact, rel=0.02)


def test_who_hears_nobody_has_one_effective_neighbor_and_who_averages_has_all():
    assert effective_neighbors(latin(1, 1)) == 1
    assert effective_neighbors(complete(16)) == pytest.approx(16)
    assert effective_neighbors(exponential(16), 0.0) == pytest.approx(2)  # no past: oneself and one other


# Mean squared distance to the average under white noise without forgetting, measured by simulation to two digits.
@pytest.mark.parametrize(
    ("build", "in_turn", "table"),
    [
        (exponential, True, {8: 0.50, 16: 0.69, 32: 0.81, 64: 0.89}),
        (lambda n: exponential(n, 2), True, {8: 0.22, 16: 0.34, 32: 0.40, 64: 0.44}),
        (lambda n: exponential(n, 3), True, {8: 0.25, 16: 0.19, 32: 0.38, 64: 0.28}),
        (lambda n: balanced(n, 200), False, {8: 0.66, 16: 0.82}),
        (lambda n: latin(n, n - 1), False, {32: 0.91, 64: 0.95}),
    ],
)
def test_steady_disagreement_is_as_simulated(build, in_turn, table):
    for n, simulated in table.items():
        forgetting = 1e-6
        n_eff = effective_neighbors(build(n), 1 - forgetting, in_turn=in_turn)
        assert (n / n_eff - 1) / forgetting / n == pytest.approx(simulated, abs=0.015)


def test_effective_neighbors_refuse_pools_that_lose_agreement_and_memories_without_end():
    with pytest.raises(ValueError, match=r"^`pool` must keep agreement"):
        effective_neighbors(POOLS["push"])
    with pytest.raises(ValueError, match=r"^`gamma` must be in \[0, 1\), got 1.0.$"):
        effective_neighbors(ring(4), 1.0)


def test_modes_are_the_eigenvalues_of_rounds_of_shifts_only():
    pool = exponential(12, peers=2)
    for p, eigenvalues in enumerate(modes(pool)):
        expected = np.linalg.eigvals(pool.matrix(p))
        assert abs(eigenvalues[:, None] - expected).min(1).max() < 1e-7
        assert eigenvalues[0] == pytest.approx(1)
    assert modes(hypercube(8)) is None
    assert modes(derangements(8, 2)) is None


@pytest.mark.parametrize("name", ["ring", "base", "symmetric", "pull", "exponential", "one worker"])
def test_messages_are_counted_one_by_one(name):
    pool = POOLS[name]
    n = pool.num_workers
    groups = next(d for d in (4, 3, 13, 17, 1) if n % d == 0)
    worker, host = np.zeros((pool.num_rounds, n), int), np.zeros((pool.num_rounds, groups), int)
    for p, k, i in np.ndindex(pool.receive_from.shape):
        j = pool.receive_from[p, k, i]
        worker[p, j] += j != i
        host[p, j // (n // groups)] += j // (n // groups) != i // (n // groups)
    sent = messages(pool, hosts=groups)
    np.testing.assert_array_equal(sent.worker, worker)
    np.testing.assert_array_equal(sent.host, host)
    np.testing.assert_array_equal(sent.slice, 0)
    np.testing.assert_array_equal(messages(pool, slices=groups).slice, host)


def test_messages_refuse_hosts_and_slices_that_cut_workers_unevenly():
    with pytest.raises(ValueError, match=r"^`hosts` must divide the number of workers, got 3 for 8.$"):
        messages(ring(8), hosts=3)
    with pytest.raises(ValueError, match=r"^`slices` must divide the number of workers, got 0 for 8.$"):
        messages(ring(8), slices=0)
