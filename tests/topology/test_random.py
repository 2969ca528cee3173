"""Drawn pools: what each promises for every number of workers, and the exact laws they are drawn from."""

import re
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from crossover_jax.topology import (
    advised_pool_size,
    balanced,
    contraction,
    derangements,
    latin,
    messages,
    pull,
    symmetric,
)


def all_latin(num_workers, pool_size, seed=0):
    return latin(num_workers, max(1, min(pool_size, num_workers - 1)), seed)


def in_slices(num_workers, pool_size, seed=0):
    return symmetric(num_workers, pool_size, max(d for d in range(1, 9) if num_workers % d == 0), seed=seed)


BALANCED = {"latin": all_latin, "symmetric": in_slices, "balanced": balanced, "derangements": derangements}
ALL = BALANCED | {"pull": pull}


def chi_square(counts, law):
    """Pearson's statistic: its mean is len(law) − 1, its variance twice that."""
    draws = sum(counts.values())
    assert set(counts) <= set(law)
    return sum((counts[x] - draws * float(q)) ** 2 / (draws * float(q)) for x, q in law.items())


def assert_drawn_from(law, counts):
    degrees = len(law) - 1
    assert abs(chi_square(counts, law) - degrees) < 5 * np.sqrt(2 * degrees)


def drawn(pool):
    return Counter(map(tuple, pool.receive_from[:, 0].tolist()))


@pytest.mark.parametrize("name", BALANCED)
def test_one_message_leaves_and_reaches_every_worker_in_every_round(name):
    for n in range(2, 100):
        pool = BALANCED[name](n, 5)
        for p in range(pool.num_rounds):
            W = pool.matrix(p)
            assert (np.diag(W) == 0.5).all()
            assert ((W == 0.5).sum(0) == 2).all()
            assert ((W == 0.5).sum(1) == 2).all()
            assert np.count_nonzero(W) == 2 * n


@pytest.mark.parametrize("name", ALL)
def test_one_worker_is_left_alone(name):
    pool = ALL[name](1, 1)
    assert pool.receive_from.tolist() == [[[0]]]
    assert pool.share.tolist() == [[[1.0], [0.0]]]


@pytest.mark.parametrize("name", ALL)
def test_two_workers_exchange(name):
    np.testing.assert_array_equal(ALL[name](2, 1).matrix(0), [[0.5, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize("name", ALL)
def test_a_pool_depends_on_its_seed_and_on_nothing_else(name):
    first = ALL[name](32, 4, seed=1)
    np.random.seed(0)  # noqa: NPY002 - that the global state does not matter is the point
    np.testing.assert_array_equal(first.receive_from, ALL[name](32, 4, seed=1).receive_from)
    other = ALL[name](32, 4, seed=2).receive_from
    assert other.shape != first.receive_from.shape or (other != first.receive_from).any()


def test_pools_of_running_experiments_do_not_change_under_them():
    # If numpy changes its streams, resumed runs take other peers: harmless for training, not for comparisons.
    assert latin(64, 4, seed=7).receive_from[:, 0, 0].tolist() == LATIN_OF_SEED_7


LATIN_OF_SEED_7 = [40, 47, 43, 58]


def test_latin_uses_no_ordered_pair_twice():
    for n in range(2, 60):
        heard = sum((pool := latin(n, n - 1)).matrix(p) for p in range(n - 1))
        np.testing.assert_array_equal(heard * 2 - (n - 1) * np.eye(n), 1 - np.eye(n))
        assert pool.num_peers == 1


def test_latin_consists_of_shifts():
    pool = latin(48, 9, seed=3)
    shift = (np.arange(48) - pool.receive_from[:, 0]) % 48
    assert (shift == shift[:, :1]).all()
    assert len(set(shift[:, 0])) == 9


def test_latin_without_swaps_has_no_round_in_which_two_hear_each_other():
    for n in (3, 4, 8, 9, 64):
        for seed in range(5):
            pool = latin(n, n - 2 + n % 2, seed, swaps=False)
            heard = pool.receive_from[:, 0]
            assert (np.take_along_axis(heard, heard, 1) != np.arange(n)).all()
    assert (latin(8, 7).receive_from[:, 0] == (np.arange(8) + 4) % 8).all(1).any()


@pytest.mark.parametrize("groups", [2, 4, 8, 16, 32])
def test_latin_loads_every_host_and_slice_evenly(groups):
    sent = messages(latin(64, 12), hosts=groups, slices=64 // groups)
    assert (sent.host == sent.host[:, :1]).all()
    assert (sent.slice == sent.slice[:, :1]).all()


# Figures of one best of 40 (docs/design.md); from seed to seed the best of 40 varies by about 0.01.
@pytest.mark.parametrize(("pool_size", "figure"), [(8, 0.659), (16, 0.579), (32, 0.555)])
def test_latin_contracts_as_designed_and_better_than_derangements(pool_size, figure):
    worst = contraction(latin(64, pool_size)).worst
    assert worst <= figure + 0.02
    assert worst < min(contraction(derangements(64, pool_size, seed)).worst for seed in range(10))


def test_more_tries_never_contract_worse():
    worst = [contraction(latin(64, 16, tries=tries)).worst for tries in (1, 10, 40, 1000)]
    assert worst == sorted(worst, reverse=True)
    assert worst[-1] < 0.579


@pytest.mark.parametrize("slices", [1, 2, 4, 8, 32])
def test_symmetric_is_alike_in_every_slice(slices):
    source = symmetric(32, 6, slices).receive_from[:, 0]
    local = 32 // slices
    np.testing.assert_array_equal(np.roll(source, -local, axis=-1), (source + local) % 32)
    sent = messages(symmetric(32, 6, slices), slices=slices).slice
    assert (sent == sent[:, :1]).all()


def test_symmetric_mixes_locals_as_well_as_slices():
    assert contraction(symmetric(64, 16, 8)).worst < 0.7


def uniform(n):
    fixed_point_free = [s for s in permutations(range(n)) if all(s[i] != i for i in range(n))]
    return {s: Fraction(1, len(fixed_point_free)) for s in fixed_point_free}


def law_of_algorithm_2(n, repaired=True):
    """Exact law of the sequential draw; with `repaired=False`, the share that is missing from 1 ends dead."""
    law = {(): Fraction(1)}
    for i in range(n):
        extended = Counter()
        for taken, q in law.items():
            choices = [j for j in range(n) if j != i and j not in taken]
            if repaired and i == n - 2 and n - 1 in choices:
                choices = [n - 1]
            for j in choices:
                extended[(*taken, j)] += q / len(choices)
        law = extended
    return law


def dead_end(n):
    """Exact chance that the listing without repair leaves the last worker only itself.

    State: how many of the workers that have not drawn yet are still free; by symmetry each is equally likely to be.
    """
    chance = {n: Fraction(1)}
    for i in range(n - 1):
        after = Counter()
        for free, q in chance.items():
            own = Fraction(free, n - i)  # worker i itself is free
            for mine, weight in ((1, q * own), (0, q * (1 - own))):
                if weight:
                    later, choices = free - mine, n - i - mine
                    after[later - 1] += weight * Fraction(later, choices)
                    after[later] += weight * Fraction(choices - later, choices)
        chance = after
    return chance[1]


@pytest.mark.parametrize(
    ("n", "distance", "rarest", "commonest"),
    [
        (3, Fraction(0), 0.5, 0.5),
        (4, Fraction(1, 9), 0.278, 0.444),
        (5, Fraction(101, 792), 0.205, 0.313),
        (6, Fraction(25951, 190800), 0.163, 0.264),
    ],
)
def test_algorithm_2_is_as_far_from_uniform_as_the_exact_law_says(n, distance, rarest, commonest):
    law, even = law_of_algorithm_2(n), uniform(n)
    assert sum(law.values()) == 1
    assert set(law) == set(even)
    assert sum(abs(law[s] - even[s]) for s in even) / 2 == distance
    links = Counter()
    for s, q in law.items():
        links.update({(i, j): q for i, j in enumerate(s)})
    assert float(min(links.values())) == pytest.approx(rarest, abs=6e-4)
    assert float(max(links.values())) == pytest.approx(commonest, abs=6e-4)


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_balanced_follows_the_exact_law_of_algorithm_2(n):
    counts = drawn(balanced(n, 30_000))
    assert_drawn_from(law_of_algorithm_2(n), counts)
    if n > 3:
        assert chi_square(counts, uniform(n)) > 10 * len(uniform(n))  # the sample is large enough to tell


@pytest.mark.parametrize("n", [3, 4, 5])
def test_derangements_are_uniform(n):
    assert_drawn_from(uniform(n), drawn(derangements(n, 20_000)))


@pytest.mark.parametrize(
    ("n", "chance"), [(4, 5 / 36), (8, 63853 / 705600), (16, 0.0510), (32, 0.0276), (64, 0.01453), (128, 0.00749)]
)
def test_the_published_listing_ends_dead_as_often_as_counted(n, chance):
    assert float(dead_end(n)) == pytest.approx(chance, abs=5e-5)
    if n < 8:
        assert 1 - sum(law_of_algorithm_2(n, repaired=False).values()) == dead_end(n)


@pytest.mark.parametrize("n", [2, 3, 7, 64])
def test_pull_hears_one_other_worker_and_sends_no_more_models_than_the_most_popular_one(n):
    pool = pull(n, 20, seed=n)
    matrices = np.stack([pool.matrix(p) for p in range(20)])
    assert (matrices[:, range(n), range(n)] == 0.5).all()
    assert ((matrices == 0.5).sum(2) == 2).all()
    assert np.count_nonzero(matrices) == 2 * 20 * n
    assert pool.num_peers == (np.count_nonzero(matrices, axis=1) - 1).max()


def test_pull_keeps_agreement_and_its_transpose_the_sum():
    for n in range(1, 100):
        pool = pull(n, 5)
        assert pool.keeps_agreement
        assert pool.transpose().keeps_mass
    assert not pool.keeps_mass
    assert not pool.transpose().keeps_agreement


def test_pull_draws_every_other_worker_equally_often():
    pool = pull(5, 4000)
    heard = Counter()
    for p in range(4000):
        heard.update(map(tuple, np.argwhere(pool.matrix(p) * (1 - np.eye(5))).tolist()))
    law = {(i, j): Fraction(1, 20) for i in range(5) for j in range(5) if i != j}
    assert chi_square(heard, law) < 15 + 5 * np.sqrt(30)  # five rows of four: 15 degrees of freedom


def test_pull_is_silent_where_it_can_be():
    pool = pull(64, 8)
    asked = (pool.share[:, 1:] > 0).sum()
    # What travels unasked only closes the chains of a permutation: fewer messages than K per worker.
    assert asked == 8 * 64
    assert asked <= messages(pool).worker.sum() < 0.7 * 8 * 64 * pool.num_peers


@pytest.mark.parametrize("name", ["symmetric", "balanced", "derangements", "pull", "latin"])
def test_empty_pools_are_refused(name):
    build = {"symmetric": lambda n, P: symmetric(n, P, 1), "latin": latin}.get(name, ALL[name])
    with pytest.raises(ValueError, match=r"^`num_workers` must be at least 1, got 0.$"):
        build(0, 1)
    with pytest.raises(ValueError, match=r"^`pool_size` must be at least 1, got 0.$"):
        build(4, 0)


def test_latin_refuses_more_rounds_than_there_are_shifts():
    match = r"^`pool_size` must be at most 7, the number of shifts of 8 workers, got 8.$"
    with pytest.raises(ValueError, match=match):
        latin(8, 8)
    match = r"^`pool_size` must be at most 6, the number of shifts of 8 workers that swap none, got 7.$"
    with pytest.raises(ValueError, match=match):
        latin(8, 7, swaps=False)
    with pytest.raises(ValueError, match=r"at most 0"):
        latin(2, 1, swaps=False)
    assert latin(1, 8).num_rounds == 1


def test_symmetric_refuses_slices_that_cut_workers_unevenly():
    with pytest.raises(ValueError, match=r"^`slices` must divide `num_workers`, got 3 slices of 8 workers.$"):
        symmetric(8, 2, 3)


SHIFTS = {1: 1, 2: 1, 3: 2, 4: 3, 8: 7, 9: 8, 10: 8, 16: 8, 17: 9, 64: 12, 1000: 20, 16384: 28}


def test_the_advised_pool_has_2_log2_n_shifts_and_never_more_than_there_are():
    assert {n: advised_pool_size(n) for n in SHIFTS} == SHIFTS


@pytest.mark.parametrize(
    ("workers", "by_segments"),
    [
        (64, {1: 12, 5: 12, 6: 6, 12: 12, 13: 13, 17: 17, 23: 23, 26: 13, 34: 17, 64: 8, 72: 12, 46: 23}),
        (8, {1: 7, 3: 7, 4: 4, 5: 5, 7: 7, 8: 4, 12: 6}),
        (2, {1: 1, 7: 1}),
        (1, {1: 1, 7: 1}),
    ],
)
def test_with_segments_the_advised_size_divides_them_or_they_are_too_few_for_any_that_mixes(workers, by_segments):
    assert {s: advised_pool_size(workers, s) for s in by_segments} == by_segments


@pytest.mark.parametrize("workers", [*range(2, 18), 31, 48, 64, 100, 257, 1024])
def test_an_advised_pool_mixes_at_least_half_as_fast_as_the_pool_without_segments(workers):
    """Of 13 segments, 64 workers: a pool of 1 leaves 0.998 of the disagreement per round, a pool of 13 leaves 0.6."""
    rate = lambda size: -np.log(max(contraction(latin(workers, size)).worst, 1e-12))
    rates = {}  # by size
    asked = rate(advised_pool_size(workers))
    for segments in range(1, 100):
        try:
            size = advised_pool_size(workers, segments)
        except ValueError as error:
            near = [int(s) for s in re.findall(r"take (\d+) or (\d+)\.", str(error))[0]]
            assert near[0] < segments < near[1]
            assert [s % advised_pool_size(workers, s) for s in near] == [0, 0]
        else:
            assert segments % size == 0 or (2 * segments < size == advised_pool_size(workers))
            rates[size] = rates.get(size) or rate(size)
            assert rates[size] >= asked / 2


def test_segments_that_no_well_mixing_pool_divides_are_refused_with_their_neighbours():
    for workers, segments, between in ((64, 31, "take 30 or 32"), (8, 13, "take 12 or 14"), (64, 97, "take 96 or 98")):
        with pytest.raises(ValueError, match=rf"`num_segments` must have .* got {segments}: {between}\."):
            advised_pool_size(workers, segments)
    for arguments in ((0,), (8, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            advised_pool_size(*arguments)
