"""Pools with a plan: the same for everyone who names them, nothing drawn.

All raise `ValueError` for fewer than one worker or peer.
"""

import itertools
import math

import numpy as np
from jaxtyping import Int

from crossover_jax.topology.pool import Pool, at_least


def ring(num_workers: int, directed: bool = False) -> Pool:
    """Everyone hears its two neighbours with weights 1/3; `directed`: only the one behind it, with 1/2.

    Two workers have only each other and average. A round on a directed ring leaves cos(π/n) of disagreement: slow.

    >>> ring(4, directed=True).receive_from
    array([[[3, 0, 1, 2]]])
    """
    at_least(1, num_workers=num_workers)
    # Two workers are each other's left and right neighbour: [1, -1] would weigh that one peer twice, 2/3 to 1/3.
    return _circulant(num_workers, [[1]] if directed or num_workers == 2 else [[1, -1]])


def exponential(num_workers: int, peers: int = 1) -> Pool:
    """Exponential graph: in round `p` everyone sends `j * (peers + 1)**p` workers ahead, for j = 1..peers.

    All weights are `1 / (peers + 1)`; each hop (peers + 1)**p below `num_workers` is a round. With one peer or three a
    pass averages exactly when `num_workers` is a power of two. Hops that meet are sent once, with their weights added.
    Reference: Assran et al., Stochastic Gradient Push, arXiv:1811.10792; Ying et al., Exponential Graph is Provably
    Efficient for Decentralized Deep Training, arXiv:2110.13363 (exactness).

    >>> pool = exponential(4)
    >>> (pool.matrix(1) @ pool.matrix(0) == np.full((4, 4), 1 / 4)).all()
    np.True_
    """
    at_least(1, num_workers=num_workers, peers=peers)
    strides = itertools.takewhile(lambda hop: hop < num_workers, ((peers + 1) ** p for p in itertools.count()))
    return _circulant(num_workers, [[j * stride for j in range(1, peers + 1)] for stride in strides])


def hypercube(num_workers: int) -> Pool:
    """In round `p`, workers whose numbers differ in bit `p` average in pairs; one pass averages exactly.

    Raises `ValueError` unless `num_workers` is a power of two; `base` does the same for any number.

    >>> hypercube(4).receive_from[:, 0]
    array([[1, 0, 3, 2],
           [2, 3, 0, 1]])
    """
    at_least(1, num_workers=num_workers)
    if num_workers & (num_workers - 1):
        raise ValueError(f"`num_workers` must be a power of two, got {num_workers}; `base` takes any number.")
    return base(num_workers)


def complete(num_workers: int) -> Pool:
    """Everyone hears everyone, all with weight 1/n: the exact average in one round of n − 1 messages per worker.

    >>> complete(3).num_peers
    2
    """
    at_least(1, num_workers=num_workers)
    return _circulant(num_workers, [list(range(1, num_workers))])


def base(num_workers: int, peers: int = 1) -> Pool:
    """Base-(k+1) graph: one pass averages exactly for any number of workers, with at most k = `peers` each.

    At most 2·log_{k+1}(n) + 2 rounds; every W is symmetric. A worker without a partner in a round sends nothing.
    Reference: Takezawa et al., Beyond Exponential Graph, arXiv:2305.11420, Algorithm 3.

    >>> pool = base(5)
    >>> state = np.arange(5.0)
    >>> for p in range(pool.num_rounds):
    ...     state = pool.apply(p, state)
    >>> state
    array([2., 2., 2., 2., 2.])
    """
    at_least(1, num_workers=num_workers, peers=peers)
    factors, rest = _factors(num_workers, peers + 1)
    rounds = _simple_base(num_workers, peers)
    # Where n = rest · (small factors), averaging in groups of `rest` workers and then across the groups is exact too,
    # and often shorter: 6 workers take 4 rounds in groups and 5 as one.
    if 1 < rest < num_workers:
        inside = [this.in_groups(num_workers // rest) for this in _simple_base(rest, peers)]
        across = _hyper_hypercube(num_workers, [rest, *factors], peers, first=1)
        rounds = min(rounds, inside + across, key=len)
    return Pool.from_peers(np.stack([r.receive_from for r in rounds]), np.stack([r.share for r in rounds]))


def _circulant(num_workers: int, hops: list[list[int]]) -> Pool:
    """In round `p` everyone sends `hops[p][k]` workers ahead, with equal weights; equal hops are one message."""
    hop = np.array(hops if num_workers > 1 else [[0]]) % num_workers
    # With few workers several hops reach the same one. Sent one by one they would be the same message several times:
    # the first of them takes the weight of all, the others become a hop to oneself, which is no message.
    same = hop[:, :, None] == hop[:, None, :]
    sends = (same.argmax(-1) == np.arange(hop.shape[1])) & (hop > 0)
    share = np.where(sends, same.sum(-1) / (hop.shape[1] + 1), 0.0)
    return Pool.from_peers((np.arange(num_workers) - (hop * sends)[..., None]) % num_workers, share[..., None])


class _Round:
    """One round being written: silent until disjoint sets of workers are given something to do."""

    def __init__(self, num_workers: int, peers: int):
        self.receive_from = np.tile(np.arange(num_workers), (peers, 1))
        self.share = np.zeros((peers, num_workers))

    def average(self, workers: Int[np.ndarray, "workers"], factors: list[int], j: int) -> None:
        """Workers that differ only in digit `j mod len(factors)` of their mixed-radix numbers take their average."""
        if not factors:
            return
        # There are as many rounds as the largest block needs. A smaller block averages again, which changes nothing.
        j %= len(factors)
        size = factors[j]
        cliques = workers.reshape(-1, size, math.prod(factors[:j])).swapaxes(1, 2).reshape(-1, size)
        # Every member must hear all others. As peers are permutations, they are the size − 1 rotations of the clique.
        for shift in range(1, size):
            self.receive_from[shift - 1, cliques] = np.roll(cliques, shift, axis=1)
            self.share[shift - 1, cliques] = 1 / size

    def in_groups(self, groups: int) -> "_Round":
        """The round that does in each of several groups of workers what this one does in one."""
        peers, size = self.share.shape
        copy = _Round(groups * size, peers)
        first = np.repeat(np.arange(groups), size) * size
        # Groups are ranges of workers, so that a round inside them is the same round, moved.
        copy.receive_from, copy.share = np.tile(self.receive_from, groups) + first, np.tile(self.share, groups)
        return copy


def _factors(number: int, largest: int) -> tuple[list[int], int]:
    """Factors of `number` between 2 and `largest`, in ascending order, and what is left without such factors."""
    factors = []
    # Large factors first: each one is a round, and 6 = 2 · 3 takes one with five peers instead of two.
    for factor in range(largest, 1, -1):
        while number % factor == 0:
            factors.append(factor)
            number //= factor
    return factors[::-1], number


def _hyper_hypercube(num_workers: int, factors: list[int], peers: int, *, first: int = 0) -> list[_Round]:
    """Algorithm 1: one round per factor, from `first` on, averages the cliques that differ in its digit."""
    rounds = [_Round(num_workers, peers) for _ in range(first, max(1, len(factors)))]
    for j, this in enumerate(rounds, start=first):
        this.average(np.arange(num_workers), factors, j)
    return rounds


def _blocks(workers: Int[np.ndarray, "workers"], base: int) -> list[Int[np.ndarray, "parts size"]]:
    """The workers cut after the digits of their number in base k+1, highest first; a digit counts a block's parts."""
    blocks, size = [], 1
    # The last block first: what is left after each is a multiple of the next power of `base`.
    while workers.size:
        parts = workers.size // size % base
        workers, block = np.split(workers, [workers.size - parts * size])
        if parts:
            blocks.append(block.reshape(parts, size))
        size *= base
    return blocks[::-1]


def _simple_base(num_workers: int, peers: int) -> list[_Round]:
    """Algorithm 2: every block averages; each passes down to all later ones; every part of a block averages."""
    factors, rest = _factors(num_workers, peers + 1)
    if rest == 1:  # n is a product of small numbers, and one digit after the other is exact
        return _hyper_hypercube(num_workers, factors, peers)
    blocks = _blocks(np.arange(num_workers), peers + 1)
    whole = [_factors(block.size, peers + 1)[0] for block in blocks]
    within = [_factors(block.shape[1], peers + 1)[0] or factors for block, factors in zip(blocks, whole, strict=True)]
    # First every block, by itself, comes to its own average.
    first = [_Round(num_workers, peers) for _ in whole[0]]
    for j, this in enumerate(first):
        for block, factors in zip(blocks, whole, strict=True):
            this.average(block.ravel(), factors, j)
    # Then block after block exchanges with its later workers, so that the mean over these is that of all workers, and
    # so is the mean over each part of the block, though its workers got different values. Averaging inside the parts,
    # beside the rounds that follow, is enough.
    second = [_Round(num_workers, peers) for _ in range(len(within[0]) + 1)]
    for m, this in enumerate(second):
        for l, block in enumerate(blocks):
            if m == l < len(blocks) - 1:
                _pass_down(this, block, np.arange(block[-1, -1] + 1, num_workers))
            elif m > l:
                this.average(block.ravel(), within[l], m - l - 1)
    return first + second


def _pass_down(this: _Round, block: Int[np.ndarray, "parts size"], later: Int[np.ndarray, "later"]) -> None:
    """Every later worker exchanges with one worker of each part: then it holds the average of block and later."""
    # All of the block holds its average b, so that a later worker gets b with the block's share of both, in equal parts
    # from each part. A part has at least as many workers as there are later ones, for its size is a higher power.
    weight = block.size / (block.size + len(later)) / len(block)
    for k, part in enumerate(block):
        partners = part[: len(later)]
        this.receive_from[k, later], this.receive_from[k, partners] = partners, later
        this.share[k, later] = this.share[k, partners] = weight
