import itertools

import numpy as np
import pytest

from crossover_jax.islands.peers import TRIES, asks, deal


def names(n):
    return [f"i{k:02d}" for k in range(n)]


@pytest.mark.parametrize("segment", [0, 3, 11])
def test_of_two_islands_exactly_one_asks(segment):
    for one, other in itertools.permutations(names(9), 2):
        assert asks(one, other, segment) != asks(other, one, segment)


@pytest.mark.parametrize("n", [2, 3, 8, 16])
def test_all_pairs_meet_over_time_and_no_peer_is_asked_twice_for_a_segment(n):
    rng, segments, found = np.random.default_rng(n), 8, set()
    for _ in range(60):
        for i, name in enumerate(names(n)):
            others = [other for other in names(n) if other != name]
            dealt = deal(name, others, segments, rng)
            assert len(dealt) == segments
            for k, peers in enumerate(dealt):
                assert len(peers) == len(set(peers)) <= TRIES
                assert name not in peers
                assert all(asks(name, peer, k) for peer in peers)
                found |= {(i, peer) for peer in peers}
    pairs = {frozenset((f"i{i:02d}", peer)) for i, peer in found}
    assert pairs == {frozenset(pair) for pair in itertools.combinations(names(n), 2)}


def test_segments_ask_different_peers_first():
    rng = np.random.default_rng(0)
    others = names(17)[1:]
    firsts = [[peers[0] for peers in deal("i00", others, 4, rng) if peers] for _ in range(50)]
    assert (
        all(len(set(first)) == len(first) for first in firsts if len(first) > 1)
        or np.mean([len(set(first)) / len(first) for first in firsts if first]) > 0.9
    )


def test_about_half_ask_and_half_listen():
    rng = np.random.default_rng(0)
    asking = [bool(peers) for _ in range(100) for peers in deal("i00", names(16)[1:], 8, rng)]
    assert 0.35 < np.mean(asking) < 0.65


def test_one_alone_asks_nobody():
    assert deal("a", [], 3, np.random.default_rng(0)) == [[], [], []]
