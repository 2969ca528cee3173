"""Floating-point operations of a traced program."""

import math
from collections.abc import Callable
from typing import Any

from crossover_jax.traced import Equation, total, trace_worker


def operations(function: Callable[..., Any], *args: Any, axes: dict[str, int] | None = None) -> float:
    """Floating-point operations of the matrix products and convolutions in one call of `function`.

    `function` is traced on values or shapes, not run; `axes` names the axes it expects around it, with their sizes. A
    product counts 2 per multiply-add. What is in a `scan` counts as often as it runs (which XLA's own cost analysis
    does not do), what is in a `while` once, what is recomputed for a gradient again, and of the branches of a
    conditional the dearest.

    >>> import jax.numpy as jnp
    >>> operations(lambda x: x @ x, jnp.zeros((10, 10)))
    2000.0
    """
    return total(trace_worker(function, *args, axes=axes or {}).jaxpr, _multiplications)


def _multiplications(eqn: Equation) -> float:
    params = eqn.params
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        taps = kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * eqn.outvars[0].aval.size * taps / math.prod(params["lhs_dilation"])  # zeros between are no work
    return 0.0
