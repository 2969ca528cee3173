"""How fast a pool mixes, and how many messages that takes.

Disagreement is what I − J leaves of a state, J = 11ᵀ/n. Pools of shifts are solved by Fourier transform, pools of few
workers by dense matrices, all others without a matrix, so that 16,384 workers are as welcome as 8.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float, Int

from crossover_jax.topology.pool import Pool

Rounds = Iterable[int | np.integer]
_DENSE = 128  # workers up to which a matrix is cheaper than avoiding it


class Contraction(NamedTuple):
    """Share of the squared disagreement that one round leaves."""

    worst: float
    mean: float


class Messages(NamedTuple):
    """Messages sent per round: by each worker, out of each host, out of each slice."""

    worker: Int[np.ndarray, "pool workers"]
    host: Int[np.ndarray, "pool hosts"]
    slice: Int[np.ndarray, "pool slices"]


def contraction(pool: Pool) -> Contraction:
    """Mean-square contraction of disagreement by a round drawn uniformly from the pool: E|(I−J)Wd|² / |d|².

    `worst` is the largest over all directions d of disagreement, `mean` their average (0 for one worker). With k peers
    of equal weight the mean is `ideal_contraction`, so that is the least that worst can be.
    Reference: Boyd et al., Randomized Gossip Algorithms, IEEE Trans. Inf. Theory 52(6), 2006: λ₂ of E[WᵀW].

    >>> from crossover_jax.topology import ring
    >>> np.round(contraction(ring(4, directed=True)), 3)
    array([0.5  , 0.333])
    """
    if pool.num_workers == 1:
        return Contraction(0.0, 0.0)
    if (eigenvalues := modes(pool)) is not None:
        squares = (np.abs(eigenvalues[:, 1:]) ** 2).mean(0)
        return Contraction(float(squares.max()), float(squares.mean()))
    # All rounds stacked are one tall matrix A with |A d|² = Σ_p |W_p d|², so that worst is its largest singular value,
    # squared, over the number of rounds. Its eigenvalue problem would need E[WᵀW], which is dense.
    back, rounds = pool.transpose(), range(pool.num_rounds)
    worst = _largest_singular_value(
        lambda x: np.stack([_centred(pool.apply(p, x)) for p in rounds]),
        lambda y: _centred(np.sum([back.apply(p, y[p]) for p in rounds], axis=0)),
        pool.num_workers,
    )
    squares = [_squared_disagreement(pool, back, p) for p in rounds]
    return Contraction(float(worst**2 / len(rounds)), float(np.mean(squares) / (pool.num_workers - 1)))


def ideal_contraction(num_workers: int, peers: int = 1) -> float:
    """Contraction in every direction when all others are heard equally often: (n/(k+1) − 1) / (n − 1), k = `peers`.

    >>> round(ideal_contraction(64), 3)
    0.492
    """
    return max(0.0, num_workers / (peers + 1) - 1) / max(1, num_workers - 1)


def product(pool: Pool, rounds: Rounds) -> Float[np.ndarray, "workers workers"]:
    """Exactly what `rounds` do one after another, such as a column of a table: the last W times … times the first.

    Rounds of −1 stay at home. A dense matrix: for thousands of workers use `decay`.

    >>> from crossover_jax.topology import exponential
    >>> product(exponential(4), [0, 1])[0]
    array([0.25, 0.25, 0.25, 0.25])
    """
    return _run(pool, rounds, np.eye(pool.num_workers))


def decay(pool: Pool, rounds: Rounds) -> Iterator[float]:
    """After each of `rounds`, the largest share of any disagreement that is left: |(I−J) W…W (I−J)|₂.

    For doubly stochastic rounds this is the second singular value of the product. Rounds of −1 stay at home.

    >>> from crossover_jax.topology import exponential
    >>> [round(left, 3) for left in decay(exponential(8), [0, 1, 2])]
    [0.924, 0.653, 0.0]
    """
    if (eigenvalues := modes(pool)) is not None:
        left = np.ones(pool.num_workers - 1)
        for p in rounds:
            left = left if p < 0 else left * np.abs(eigenvalues[p, 1:])
            yield float(left.max(initial=0.0))  # one worker has no modes of disagreement
    elif pool.num_workers <= _DENSE:
        state = _centred(np.eye(pool.num_workers))
        for p in rounds:
            state = _run(pool, [p], state)
            yield float(np.linalg.norm(_centred(state), ord=2))
    else:
        back, done = pool.transpose(), []
        for p in rounds:
            done.append(p)
            yield _largest_singular_value(
                lambda x: _centred(_run(pool, done, x)), lambda y: _centred(_run(back, done[::-1], y)), pool.num_workers
            )


def rounds_until(pool: Pool, rounds: Rounds, below: float = 0.1) -> int | None:
    """The number of `rounds` after which less than the share `below` is left of any disagreement, None if never.

    >>> from crossover_jax.topology import ring
    >>> rounds_until(ring(8, directed=True), [0] * 100)
    30
    """
    return next((t for t, left in enumerate(decay(pool, rounds), start=1) if left < below), None)


def effective_neighbors(pool: Pool, gamma: float = 0.9, *, in_turn: bool = False) -> float:
    """With how many workers one effectively averages, between 1 (nobody hears anybody) and n (exact averages).

    In the random walk x <- W (√γ x + noise), noise white and of unit variance,

        n_W(γ) = 1/(1−γ) / (1/n Σ_i Var x_i) = n / (1 + (1−γ) Σ_{t≥1} γ^{t−1} E|W_t…W_1 (I−J)|²_F)

    where `gamma` says how long the past matters (1/(1−γ) rounds). The paper has one W; here rounds are drawn uniformly,
    or taken `in_turn`, averaged over the phases. Up to 128 workers and for shifts exact, else sampled to about 1 %.
    Raises `ValueError` for a pool that does not keep agreement and for `gamma` outside [0, 1).
    Reference: Vogels, Hendrikx, Jaggi, Beyond Spectral Gap, arXiv:2206.03093, and the authors' `random_walks.py`.

    >>> from crossover_jax.topology import complete
    >>> round(effective_neighbors(complete(16), gamma=0.5), 9)
    16.0
    """
    if not pool.keeps_agreement:
        raise ValueError("`pool` must keep agreement (rows of every W sum to 1); `pool.transpose()` may.")
    if not 0 <= gamma < 1:
        raise ValueError(f"`gamma` must be in [0, 1), got {gamma}.")
    # The series is summed until what is left of it is small, or until a term repeats: then disagreement falls no more
    # (a pool that does not connect its workers), and the rest is a geometric series.
    total, rest, before = 0.0, 0.0, np.inf
    for t, left in enumerate(_disagreement_left(pool, in_turn)):
        total += gamma**t * left
        rest = gamma ** (t + 1) * left / (1 - gamma)  # of the series, if nothing changes any more
        if rest <= 1e-9 * (total + 1) or abs(left - before) <= 1e-12 * left:
            break
        before = left
    return float(pool.num_workers / (1 + (1 - gamma) * (total + rest)))


def messages(pool: Pool, hosts: int = 1, slices: int = 1) -> Messages:
    """How many messages every worker sends in each round, and how many leave every host and every slice.

    Workers are numbered host by host and slice by slice. As rows are permutations, as many arrive as leave. A message
    with share 0 counts: it travels. Raises `ValueError` unless `hosts` and `slices` divide the number of workers.

    >>> from crossover_jax.topology import ring
    >>> messages(ring(8, directed=True), hosts=2)
    Messages(worker=array([[1, 1, 1, 1, 1, 1, 1, 1]]), host=array([[1, 1]]), slice=array([[0]]))
    """

    def leaving(name: str, groups: int) -> Int[np.ndarray, "pool groups"]:
        if groups < 1 or pool.num_workers % groups:
            raise ValueError(f"`{name}` must divide the number of workers, got {groups} for {pool.num_workers}.")
        group = np.arange(pool.num_workers) * groups // pool.num_workers
        return (group[pool.receive_from] != group).sum(1).reshape(pool.num_rounds, groups, -1).sum(-1)

    return Messages(leaving("num_workers", pool.num_workers), leaving("hosts", hosts), leaving("slices", slices))


def modes(pool: Pool) -> Complex[np.ndarray, "pool workers"] | None:
    """Eigenvalues of every round (mode 0: agreement) if all are shifts with the same shares everywhere, else None."""
    # A shift with equal shares is a circulant matrix: what worker 0 hears says all, and its Fourier transform are the
    # eigenvalues. All rounds commute then, so that mixing in any order is a product of numbers, mode by mode.
    everyone = np.arange(pool.num_workers)
    hop = (everyone - pool.receive_from) % pool.num_workers
    if (hop != hop[..., :1]).any() or (pool.share != pool.share[..., :1]).any():
        return None
    kernel = np.zeros((pool.num_rounds, pool.num_workers))
    for p, hops in enumerate(hop[..., 0]):
        np.add.at(kernel[p], np.concatenate([[0], hops]), pool.share[p, :, 0])
    return np.fft.fft(kernel)


def _centred(x: Float[np.ndarray, "workers *rest"]) -> Float[np.ndarray, "workers *rest"]:
    return x - x.mean(0)


def _squared_disagreement(pool: Pool, back: Pool, p: int) -> float:
    """|(I−J) W (I−J)|²_F of round `p`, from the entries of W and its row and column sums."""
    # |W|² sums over pairs of peers that are the same worker, for their shares add up in one entry. Centring takes away
    # the squares of row sums and of column sums, and gives back the square of the total, taken away twice.
    sources = np.concatenate([np.arange(pool.num_workers)[None], pool.receive_from[p]])
    share, ones = pool.share[p], np.ones(pool.num_workers)
    entries = np.einsum("ai,bi,abi->", share, share, sources[:, None] == sources[None])
    rows, columns = pool.apply(p, ones), back.apply(p, ones)
    return entries - (rows @ rows + columns @ columns) / len(ones) + (rows.sum() / len(ones)) ** 2


def _run(pool: Pool, rounds: Rounds, x: Float[np.ndarray, "workers *rest"]) -> Float[np.ndarray, "workers *rest"]:
    for p in rounds:
        x = x if p < 0 else pool.apply(p, x)
    return x


def _largest_singular_value(
    forward: Callable[[np.ndarray], np.ndarray], backward: Callable[[np.ndarray], np.ndarray], num_workers: int
) -> float:
    """Lanczos on backward(forward(·)) from a random disagreement, fully orthogonalised, until the residual is small."""
    # Power iteration would not do: the largest singular values of a well mixing pool lie close together. Of a symmetric
    # operator every eigenvalue is reached after n − 1 steps, from a start that has a part in all directions.
    steps = min(num_workers - 1, 300)
    start = _centred(np.random.default_rng(0).standard_normal(num_workers))
    basis = np.zeros((steps + 1, num_workers))
    basis[0] = start / np.linalg.norm(start)
    projected = np.zeros((steps, steps))
    for j in range(steps):
        image = backward(forward(basis[j]))
        for _ in range(2):  # once leaves rounding errors that grow into copies of the largest eigenvalue
            overlap = basis[: j + 1] @ image
            projected[j, : j + 1] += overlap
            image = image - overlap @ basis[: j + 1]
        residual = np.linalg.norm(image)
        if j % 8 == 7 or j == steps - 1 or residual < 1e-14:
            values, vectors = np.linalg.eigh(projected[: j + 1, : j + 1])
            # The error of the eigenvalue is the square of this, divided by the gap to the next one.
            if residual * abs(vectors[-1, -1]) <= 1e-4 * values[-1] or residual < 1e-14:
                break
        basis[j + 1] = image / residual
    return float(np.linalg.norm(forward(vectors[:, -1] @ basis[: j + 1])))


def _disagreement_left(pool: Pool, in_turn: bool) -> Iterator[float]:
    """E|W_t…W_1 (I−J)|²_F for t = 1, 2, …, with rounds drawn uniformly or taken in turn from a uniform phase."""
    eigenvalues = modes(pool)
    if eigenvalues is None and pool.num_workers > _DENSE:
        yield from _left_of_probes(pool, in_turn)
    back, gains = pool.transpose(), None if eigenvalues is None else np.abs(eigenvalues[:, 1:]) ** 2
    disagreement = _centred(np.eye(pool.num_workers)) if gains is None else 1.0
    # gram[p] is E (W_t…W_1)ᵀ(W_t…W_1) with round p first: W_pᵀ (what follows) W_p, by its eigenvalues for shifts.
    gram = np.array([np.eye(pool.num_workers)] * pool.num_rounds) if gains is None else np.ones_like(gains)
    while True:
        follows = np.roll(gram, -1, axis=0) if in_turn else np.broadcast_to(gram.mean(0), gram.shape)
        if gains is None:
            gram = np.stack([back.apply(p, back.apply(p, after).T) for p, after in enumerate(follows)])
        else:
            gram = gains * follows
        yield float(np.sum(gram * disagreement) / pool.num_rounds)


def _left_of_probes(pool: Pool, in_turn: bool, probes: int = 64) -> Iterator[float]:
    # E|M (I−J)|²_F is what M leaves, on average, of white noise. A phase drawn for each probe stands for all phases.
    rng = np.random.default_rng(0)
    states = [_centred(x) for x in rng.standard_normal((probes, pool.num_workers))]
    scale = (pool.num_workers - 1) / sum(x @ x for x in states)
    phase = rng.integers(pool.num_rounds, size=probes)
    while True:
        states = [pool.apply(p, x) for p, x in zip(phase, states, strict=True)]
        yield float(scale * sum(x @ x for x in states))
        phase = (phase + 1) % pool.num_rounds if in_turn else rng.integers(pool.num_rounds, size=probes)
