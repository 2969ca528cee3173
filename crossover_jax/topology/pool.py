"""`Pool`: who hears whom, as data."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


def at_least(minimum: int, **arguments: int) -> None:
    """Raise `ValueError` for the first of `arguments` that is below `minimum`."""
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Rounds of communication, each one or more permutations of the workers with shares.

    In round `p`, worker `i` takes

        x_i <- share[p, 0, i] * x_i + sum_k share[p, 1 + k, i] * x_j,   j = receive_from[p, k, i]

    Every row `receive_from[p, k]` is a permutation, so one message leaves and one reaches each worker per peer:
    the load balance of Crossover-SGD (arXiv:2012.15198, Algorithm 2) is a property of the type. A fixed point
    `receive_from[p, k, i] == i` is no message. Raises `ValueError` for rows that are not permutations, for shapes
    that do not agree and for negative shares.

    >>> pool = Pool(np.array([[[1, 2, 0]]]), np.full((1, 2, 3), 0.5))
    >>> pool.matrix(0)
    array([[0.5, 0.5, 0. ],
           [0. , 0.5, 0.5],
           [0.5, 0. , 0.5]])
    """

    receive_from: Int[np.ndarray, "pool peers workers"]
    share: Float[np.ndarray, "pool peers_and_self workers"]

    def __post_init__(self):
        rounds, peers, workers = self.receive_from.shape
        shape = (rounds, peers + 1, workers)
        if self.share.shape != shape:
            raise ValueError(f"`share` must have shape {shape} (rounds, 1 + peers, workers), got {self.share.shape}.")
        wrong = (np.sort(self.receive_from, axis=-1) != np.arange(workers)).any(-1)
        if wrong.any():
            p, k = np.argwhere(wrong)[0]
            raise ValueError(
                f"`receive_from` must hold permutations of 0..{workers - 1}, "
                f"got {self.receive_from[p, k].tolist()} for round {p}, peer {k}."
            )
        if not (np.isfinite(self.share).all() and (self.share >= 0).all()):
            raise ValueError(f"`share` must be finite and not negative, got a minimum of {self.share.min()}.")

    @classmethod
    def from_peers(
        cls,
        receive_from: Int[np.ndarray, "pool peers workers"],
        share: float | Float[np.ndarray, "pool peers #workers"],
    ) -> "Pool":
        """The pool in which every worker gives its peers `share` and itself what is left to 1.

        >>> Pool.from_peers(np.array([[[1, 0]]]), 0.25).share
        array([[[0.75, 0.75],
                [0.25, 0.25]]])
        """
        # What oneself keeps is the rest to 1, so that rows sum to 1 and workers that agree go on agreeing.
        heard = np.broadcast_to(share, receive_from.shape)
        return cls(receive_from, np.concatenate([1 - heard.sum(1, keepdims=True), heard], axis=1))

    @property
    def num_rounds(self) -> int:
        return self.receive_from.shape[0]

    @property
    def num_peers(self) -> int:
        return self.receive_from.shape[1]

    @property
    def num_workers(self) -> int:
        return self.receive_from.shape[2]

    def matrix(self, p: int | np.integer) -> Float[np.ndarray, "workers workers"]:
        """Mixing matrix W of round `p`: row `i` holds the weights with which worker `i` hears the others."""
        mixing = np.diag(self.share[p, 0]).astype(np.float64)
        for k, sources in enumerate(self.receive_from[p]):
            # Two peers may be the same worker: their shares add up, which an assignment would not do.
            np.add.at(mixing, (np.arange(self.num_workers), sources), self.share[p, 1 + k])
        return mixing

    def apply(self, p: int | np.integer, x: Float[np.ndarray, "workers *rest"]) -> Float[np.ndarray, "workers *rest"]:
        """One round on the host, `matrix(p) @ x` without the matrix: linear in the number of workers."""
        share = self.share[p].reshape(self.share.shape[1:] + (1,) * (x.ndim - 1))
        return share[0] * x + sum(share[1 + k] * x[sources] for k, sources in enumerate(self.receive_from[p]))

    def transpose(self) -> "Pool":
        """The pool whose matrices are the transposes: what was pulled is pushed."""
        # Whom worker i heard now hears i, with the share that i gave: permutation and shares are both inverted.
        backward = np.argsort(self.receive_from, axis=-1)
        pushed = np.take_along_axis(self.share[:, 1:], backward, axis=-1)
        return Pool(backward, np.concatenate([self.share[:, :1], pushed], axis=1))

    @property
    def keeps_agreement(self) -> bool:
        """Rows of every W sum to 1: workers that agree go on agreeing."""
        return bool(np.allclose(self.share.sum(1), 1.0, atol=1e-12))

    @property
    def keeps_mass(self) -> bool:
        """Columns of every W sum to 1: the sum over workers, hence the average, is kept."""
        return self.transpose().keeps_agreement
