"""Graphs against matrices written from their definitions, and against the exact average."""

import math

import numpy as np
import pytest

from crossover_jax.topology import base, complete, exponential, hypercube, messages, product, ring

WORKERS = range(1, 100)
POWERS = [1, 2, 4, 8, 16, 32, 64, 128]


def one_pass(pool):
    return product(pool, range(pool.num_rounds))


def sends(num_workers, hops):
    """W of the round in which everyone sends `hops` workers ahead, all weights equal, entry by entry."""
    W = np.eye(num_workers) / (len(hops) + 1)
    for hop in hops:
        for i in range(num_workers):
            W[(i + hop) % num_workers, i] += 1 / (len(hops) + 1)
    return W


@pytest.mark.parametrize("build", [ring, exponential, complete, base])
def test_every_round_is_doubly_stochastic_for_every_number_of_workers(build):
    for n in WORKERS:
        pool = build(n)
        for p in range(pool.num_rounds):
            W = pool.matrix(p)
            assert (W >= 0).all()
            np.testing.assert_allclose([W.sum(0), W.sum(1)], 1, atol=1e-12)


@pytest.mark.parametrize("build", [ring, exponential, complete, base, hypercube])
def test_one_worker_is_left_alone(build):
    pool = build(1)
    assert pool.receive_from.tolist() == [[[0]]]
    assert pool.share.tolist() == [[[1.0], [0.0]]]


def test_two_workers_average_on_every_graph():
    for pool in ring(2), exponential(2), complete(2), base(2), hypercube(2):
        np.testing.assert_allclose(one_pass(pool), 0.5)
        assert pool.num_rounds == 1
        assert messages(pool).worker.tolist() == [[1, 1]]


@pytest.mark.parametrize("peers", [1, 2, 3, 4])
def test_exponential_sends_j_times_powers_of_one_more_than_its_peers_ahead(peers):
    for n in range(2, 100):
        pool = exponential(n, peers)
        hops = [(peers + 1) ** p for p in range(n) if (peers + 1) ** p < n]
        assert pool.num_rounds == len(hops)
        for p, hop in enumerate(hops):
            np.testing.assert_allclose(pool.matrix(p), sends(n, [j * hop for j in range(1, peers + 1)]), atol=1e-15)


def test_ring_hears_both_neighbours_and_directed_ring_the_one_behind():
    for n in range(3, 20):
        np.testing.assert_allclose(ring(n).matrix(0), sends(n, [1, -1]), atol=1e-15)
        np.testing.assert_allclose(ring(n, directed=True).matrix(0), sends(n, [1]))


def test_hops_that_meet_are_sent_once():
    second = messages(exponential(8, peers=3)).worker[1]  # hops 4, 8, 12 of 8 workers: one peer, twice, and oneself
    assert second.tolist() == [1] * 8


@pytest.mark.parametrize("n", POWERS)
def test_one_pass_averages_exactly_over_powers_of_two(n):
    for pool in exponential(n), exponential(n, peers=3), hypercube(n):
        np.testing.assert_allclose(one_pass(pool), 1 / n, atol=1e-14)


def test_complete_averages_in_one_round():
    for n in WORKERS:
        np.testing.assert_allclose(complete(n).matrix(0), 1 / n, atol=1e-14)


def test_hypercube_pairs_workers_that_differ_in_one_bit():
    pool = hypercube(32)
    bits = 2 ** np.arange(5)
    np.testing.assert_array_equal(pool.receive_from[:, 0], np.arange(32) ^ bits[:, None])


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_base_averages_exactly_and_within_its_length_for_every_number_of_workers(degree):
    for n in WORKERS:
        pool = base(n, degree)
        np.testing.assert_allclose(one_pass(pool), 1 / n, atol=1e-13)
        assert pool.num_rounds <= 2 * math.log(n, degree + 1) + 2


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_base_is_symmetric_with_at_most_its_degree_of_peers(degree):
    for n in WORKERS:
        pool = base(n, degree)
        for p in range(pool.num_rounds):
            W = pool.matrix(p)
            np.testing.assert_allclose(W, W.T, atol=1e-15)
            assert ((W > 0) & ~np.eye(n, dtype=bool)).sum(1).max(initial=0) <= degree
        # Whoever sends is heard: nothing with share 0 travels.
        assert (pool.share[:, 1:][pool.receive_from != np.arange(n)] > 0).all()


def test_base_splits_the_workers_into_groups_where_that_is_shorter():
    assert base(6).num_rounds == 4  # two groups of three, then pairs; as one block of 4 + 2 it would take 5
    assert [base(n).num_rounds for n in (3, 5, 7)] == [3, 5, 5]


@pytest.mark.parametrize("hosts", [1, 2, 4, 8, 16])
def test_rings_and_exponential_graphs_load_hosts_evenly(hosts):
    for pool in ring(16), ring(16, directed=True), exponential(16), exponential(16, peers=2), complete(16):
        leaving = messages(pool, hosts=hosts).host
        assert (leaving == leaving[:, :1]).all()


@pytest.mark.parametrize("build", [ring, exponential, complete, base, hypercube])
def test_no_workers_are_refused(build):
    with pytest.raises(ValueError, match=r"^`num_workers` must be at least 1, got 0.$"):
        build(0)


def test_no_peers_are_refused():
    with pytest.raises(ValueError, match=r"^`peers` must be at least 1, got 0.$"):
        exponential(8, peers=0)
    with pytest.raises(ValueError, match=r"^`peers` must be at least 1, got 0.$"):
        base(8, peers=0)


def test_hypercube_refuses_what_is_no_power_of_two():
    with pytest.raises(ValueError, match=r"^`num_workers` must be a power of two, got 12; `base` takes any number.$"):
        hypercube(12)
