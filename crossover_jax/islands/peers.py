"""Which islands are asked for which segment: shifts of those that live, dealt to segments, as on a mesh."""

import hashlib
from collections.abc import Sequence

import numpy as np

from crossover_jax.topology import latin, shuffle

TRIES = 4  # peers that are asked for a segment of one publication


def deal(name: str, living: Sequence[str], num_segments: int, rng: np.random.Generator) -> list[list[str]]:
    """For each segment, whom the island `name` asks, one after the other; nobody where it is to be asked instead.

    An island that asks is busy meanwhile, so of each segment about half of all islands ask and half listen, drawn anew
    each time. Of two islands always the same one asks for a segment, or each would find the other busy.

    >>> [len(peers) for peers in deal("a", ["b"], 4, np.random.default_rng(0))]
    [0, 0, 1, 0]
    """
    if not living:
        return [[] for _ in range(num_segments)]
    ring = sorted([name, *living])
    count, seed = min(len(living), num_segments), int(rng.integers(1 << 31))
    peers = latin(len(ring), count, seed, tries=1).receive_from[:, 0, ring.index(name)]
    (rounds,) = shuffle(num_segments, count, period=1, seed=seed)
    dealt = []
    for segment, first in enumerate(rounds):
        order = [ring[peers[(first + attempt) % count]] for attempt in range(count)]
        share = sum(asks(name, peer, segment) for peer in living) / len(living)
        dealt.append(_asked(name, order, segment) if rng.random() < share else [])
    return dealt


def deal_again(name: str, living: Sequence[str], segment: int, rng: np.random.Generator) -> list[str]:
    """The same for one segment that has met nobody yet, in any order."""
    mine = _asked(name, [living[i] for i in rng.permutation(len(living))], segment, len(living))
    return mine[:TRIES] if living and rng.random() < len(mine) / len(living) else []


def _asked(name: str, order: Sequence[str], segment: int, most: int = TRIES) -> list[str]:
    return [peer for peer in order if asks(name, peer, segment)][:most]


def asks(one: str, other: str, segment: int) -> bool:
    """Whether of two islands the first asks the second for a segment; if not, the second asks the first."""
    pair = f"{segment} {min(one, other)} {max(one, other)}".encode()
    return bool(hashlib.sha256(pair).digest()[0] & 1) == (one < other)
