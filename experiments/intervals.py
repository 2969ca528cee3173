"""Means over seeds and their intervals."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean with half of its 95 % interval."""

    mean: float
    half: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:+{spec}} ± {self.half:{spec}}"

    def __str__(self) -> str:
        return f"{self:.2f}"


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean and half of Student's 95 % interval; infinite for one value.

    >>> print(interval([1.0, 2.0, 3.0]))
    +2.00 ± 2.48
    """
    x = np.asarray(values, float)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.inf
    return Interval(float(x.mean()), float(half))


def paired(of: Mapping[int, float], to: Mapping[int, float]) -> Interval:
    """How much better `of` is than `to`, over the seeds that both have.

    >>> print(paired({0: 2.0, 1: 4.0}, {0: 1.0, 1: 2.0, 2: 0.0}))
    +1.50 ± 6.35
    """
    return interval([of[seed] - to[seed] for seed in sorted(of.keys() & to.keys())])
