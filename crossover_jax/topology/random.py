"""Pools that are drawn: load-balanced random permutations, and `pull`, which is not balanced.

All draws come from `np.random.default_rng([seed, num_workers, pool_size])`: every host draws the same pool without a
message. One worker hears nobody, whatever the pool: one round that leaves it alone. Sizes below 1 are a `ValueError`.
"""

import itertools
import math

import numpy as np
from jaxtyping import Bool, Int

from crossover_jax.topology.graphs import ring
from crossover_jax.topology.pool import Pool, at_least


def latin(num_workers: int, pool_size: int, seed: int = 0, *, tries: int = 40, swaps: bool = True) -> Pool:
    """Rows of the cyclic Latin square: in round `p` everyone sends `s_p` workers ahead, for distinct random `s_p`.

    No worker hears another twice over the pool; every host and every slice sends equally many messages in every round;
    between slices a shift compiles without conditionals. Of `tries` draws the best contracting is kept: the smallest
    worst-direction mean square max_{f≠0} 1/P Σ_p ½(1 + cos 2πf s_p/n). Take P ≥ 2·log2 n. `swaps=False` leaves out the
    shift of n/2, by which workers exchange in pairs: between CPU hosts (Gloo) one of a pair sends when the other is
    done, and the round takes twice as long. Raises `ValueError` for a pool of more shifts than there are.

    >>> np.sort(latin(5, pool_size=4).receive_from[:, 0, 0])  # whom worker 0 hears
    array([1, 2, 3, 4])
    """
    at_least(1, num_workers=num_workers, pool_size=pool_size, tries=tries)
    if num_workers == 1:
        return ring(1)
    possible = np.array([s for s in range(1, num_workers) if swaps or 2 * s != num_workers])
    if pool_size > len(possible):
        raise ValueError(
            f"`pool_size` must be at most {len(possible)}, the number of shifts of {num_workers} workers"
            f"{'' if swaps else ' that swap none'}, got {pool_size}."
        )
    rng = np.random.default_rng([seed, num_workers, pool_size])
    # A single draw of few shifts often leaves some direction of disagreement slow, and choosing costs one FFT of all.
    draws = np.stack([possible[rng.choice(len(possible), pool_size, replace=False)] for _ in range(tries)])
    taken = np.zeros((tries, num_workers))
    np.put_along_axis(taken, draws, 1.0, axis=1)
    # W of a shift has |λ_f|² = ½(1 + cos 2πf s/n): directions differ by the sum of these cosines over a draw.
    shifts = draws[np.argmin(np.fft.rfft(taken)[:, 1:].real.max(1))]
    return Pool.from_peers((np.arange(num_workers) - shifts[:, None, None]) % num_workers, 0.5)


def advised_pool_size(num_workers: int, num_segments: int | None = None) -> int:
    """The number of shifts for `latin` that mixes well: about 2 log2 n, at least 8, at most n − 1.

    Of an exchange in `num_segments` equal segments the size is a divisor of their number, so that every shift is one
    channel. It is then between half and twice the size that 2 log2 n asks for, and a round mixes at least half as much
    (in the logarithm of `contraction`). Fewer segments than half that size leave no such divisor: then the pool has
    its full size, and the exchange compiles to a `lax.switch` per segment. Raises `ValueError` for segments that would
    need a pool which hardly mixes; the message names the nearest numbers that work.

    >>> advised_pool_size(64), advised_pool_size(64, 26), advised_pool_size(8)
    (12, 13, 7)
    """
    at_least(1, num_workers=num_workers)
    most = max(1, num_workers - 1)
    wanted = min(most, max(8, math.ceil(2 * math.log2(num_workers))))
    if num_segments is None:
        return wanted
    at_least(1, num_segments=num_segments)
    if 2 * num_segments < wanted:
        return wanted
    if size := _divisor_near(wanted, most, num_segments):
        return size
    below, above = (
        next(s for s in itertools.count(num_segments, step) if _divisor_near(wanted, most, s)) for step in (-1, 1)
    )
    raise ValueError(
        f"`num_segments` must have a divisor from {math.ceil(wanted / 2)} to {min(2 * wanted, most)}, the sizes of a "
        f"pool that mixes {num_workers} workers well, got {num_segments}: take {below} or {above}."
    )


def _divisor_near(wanted: int, most: int, number: int) -> int | None:
    """The largest divisor of `number` from half of `wanted` to it, else the smallest up to its double, else None."""
    # Below half, a direction of disagreement is left that hardly shrinks; with one shift of 64, 0.998 of it per round.
    smaller = range(wanted, (wanted - 1) // 2, -1)
    # Above, a pool mixes no worse, but a program of more channels sends more and smaller messages.
    larger = range(wanted + 1, min(2 * wanted, most) + 1)
    return next((size for size in itertools.chain(smaller, larger) if number % size == 0), None)


def symmetric(num_workers: int, pool_size: int, slices: int, *, seed: int = 0) -> Pool:
    """Random permutations without fixed points that are alike in every slice: moving all slices by one changes nothing.

    Worker `(slice, local)` hears `(slice + d[local], π[local])`: every slice sends equally many messages out, and the
    permutation compiles without a branch per slice. Raises `ValueError` when `slices` does not divide `num_workers`.

    >>> source = symmetric(12, pool_size=1, slices=3).receive_from[0, 0].reshape(3, 4)
    >>> (source[1] == (source[0] + 4) % 12).all()
    np.True_
    """
    at_least(1, num_workers=num_workers, pool_size=pool_size, slices=slices)
    if num_workers % slices:
        raise ValueError(f"`slices` must divide `num_workers`, got {slices} slices of {num_workers} workers.")
    if num_workers == 1:
        return ring(1)
    rng = np.random.default_rng([seed, num_workers, pool_size])
    return Pool.from_peers(np.stack([[_alike(rng, slices, num_workers // slices)] for _ in range(pool_size)]), 0.5)


def balanced(num_workers: int, pool_size: int, seed: int = 0) -> Pool:
    """The paper's load-balanced random topology: workers choose in turn among those that nobody has chosen yet.

    Worker `i` receives from the one it chose. The published listing can leave the last worker only itself; as in the
    authors' code, worker n−2 takes worker n−1 when that one is still free. The law is not quite uniform over
    derangements (total variation distance 1/9 for n = 4).
    Reference: Yeo et al., Crossover-SGD, arXiv:2012.15198, Algorithm 2.

    >>> balanced(2, pool_size=1).receive_from
    array([[[1, 0]]])
    """
    at_least(1, num_workers=num_workers, pool_size=pool_size)
    if num_workers == 1:
        return ring(1)
    rng = np.random.default_rng([seed, num_workers, pool_size])
    return Pool.from_peers(np.stack([[_choose_in_turn(rng, num_workers)] for _ in range(pool_size)]), 0.5)


def derangements(num_workers: int, pool_size: int, seed: int = 0) -> Pool:
    """Independent permutations without fixed points, each exactly uniform (drawn until one has none: e ≈ 2.7 tries).

    >>> (derangements(5, pool_size=9).receive_from == np.arange(5)).any()
    np.False_
    """
    return symmetric(num_workers, pool_size, slices=1, seed=seed)


def pull(num_workers: int, pool_size: int, seed: int = 0) -> Pool:
    """No load balancing, the ablation: everyone hears an independent, uniformly drawn other worker, with weight 1/2.

    A popular worker sends several copies, an unpopular one none: rows of W sum to 1, columns do not, and the average
    drifts. Written as K permutations with share 0 where nothing is wanted, K being the most copies that a worker sends
    in a round: K models per worker travel here, one under MPI. `transpose()` is the push that keeps the sum.

    >>> pool = pull(8, pool_size=4)
    >>> pool.keeps_agreement, pool.keeps_mass
    (True, False)
    """
    at_least(1, num_workers=num_workers, pool_size=pool_size)
    if num_workers == 1:
        return ring(1)
    rng = np.random.default_rng([seed, num_workers, pool_size])
    # A number below n − 1, moved by one from oneself on, is uniform among the others.
    other = rng.integers(num_workers - 1, size=(pool_size, num_workers))
    wanted = other + (other >= np.arange(num_workers))
    # The k-th of those who want the same worker hears it in permutation k, so that each permutation asks it once.
    copy = np.stack([_rank_among_equals(row) for row in wanted])
    heard = copy[:, None] == np.arange(copy.max() + 1)[:, None]
    receive_from = [[_completed(row, this) for this in those] for row, those in zip(wanted, heard, strict=True)]
    return Pool.from_peers(np.array(receive_from), 0.5 * heard)


def _alike(rng: np.random.Generator, slices: int, size: int) -> Int[np.ndarray, "workers"]:
    """Uniform among the permutations of (slice, local) without fixed points that commute with moving the slices."""
    # Rejection keeps the law exactly uniform, and at least one draw of e has no fixed point, whatever the size.
    while True:
        local, distance = rng.permutation(size), rng.integers(slices, size=size)
        if ((local != np.arange(size)) | (distance != 0)).all():
            return ((np.arange(slices)[:, None] + distance) % slices * size + local).ravel()


def _choose_in_turn(rng: np.random.Generator, num_workers: int) -> Int[np.ndarray, "workers"]:
    # A list without gaps and each number's place in it make a choice take the same time for 16,384 workers as for 8.
    free, chosen = list(range(num_workers)), []
    place = list(range(num_workers))  # place[j] is where j stands in `free`, −1 once taken
    for i, u in enumerate(rng.random(num_workers).tolist()):
        last = free[-1]
        if i == num_workers - 2 and place[-1] >= 0:  # else the last worker might be left with itself
            choice = num_workers - 1
        else:
            # Uniform among all free but oneself: drawn without the last one, which stands in for oneself.
            choice = free[int(u * (len(free) - (place[i] >= 0)))]
            choice = last if choice == i else choice
        free[place[choice]], place[last] = last, place[choice]  # closes the gap of the choice
        free.pop()
        place[choice] = -1
        chosen.append(choice)
    return np.array(chosen)


def _rank_among_equals(values: Int[np.ndarray, "workers"]) -> Int[np.ndarray, "workers"]:
    """How many earlier entries hold the same value."""
    order = np.argsort(values, kind="stable")
    rank = np.arange(len(values)) - np.searchsorted(values[order], values[order])
    return rank[np.argsort(order)]


def _completed(source: Int[np.ndarray, "workers"], wanted: Bool[np.ndarray, "workers"]) -> Int[np.ndarray, "workers"]:
    """A permutation that agrees with `source` where `wanted`, and elsewhere is silent as far as possible."""
    everyone = np.arange(len(source))
    result = np.where(wanted, source, -1)
    # Who neither hears nor is heard stays alone, which is no message. Who is heard only must hear somebody: those whom
    # nobody hears are left over, as many of them, and their messages have share 0.
    idle = np.setdiff1d(everyone[~wanted], source[wanted])
    result[idle] = idle
    result[result < 0] = np.setdiff1d(everyone, result)
    return result
