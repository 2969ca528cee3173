"""What is done after each so many steps: in a single step by a conditional, in a `period` known before it runs."""

import contextlib
import contextvars
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Integer

from crossover_jax.axes import check_axis, holding, same_on_all_workers, vary
from crossover_jax.leaves import PyTree

Step = Integer[Array, ""] | int | np.integer


class Place:
    """Where in its period the step stands that is being traced."""

    def __init__(self, step: Array, length: int, is_last: bool) -> None:
        self.step, self.length, self.is_last = step, length, is_last
        self.was_asked = False  # whether another place would have made another program


_PLACE: contextvars.ContextVar[Place | None] = contextvars.ContextVar("place", default=None)


def tracing_at(place: Place) -> contextlib.AbstractContextManager[None]:
    return holding(_PLACE, place)


def is_due(step: Step, every: int) -> bool | None:
    """Whether `step` is the last of `every` steps; None where only the running program can tell."""
    if isinstance(step, int | np.integer):
        return bool(step % every == every - 1)
    place = _PLACE.get()
    # It must be the very step that `period` gave: of one that was computed from it nothing is known.
    if place is None or step is not place.step:
        return None
    if every == place.length:
        place.was_asked = True
        return place.is_last
    if every % place.length == 0 and not place.is_last:
        place.was_asked = True
        return False
    return None


def after_each(every: int, step: Step, function: Callable[[PyTree, Step], PyTree], tree: PyTree, axis: str) -> PyTree:
    """`function(tree, how many times before)` after each `every` steps, else `tree`; all workers decide alike."""
    check_axis(axis)
    if every == 1:
        return function(tree, step)
    due = is_due(step, every)
    if due is not None:
        return function(tree, step // every) if due else tree
    step = same_on_all_workers(step, axis)
    # Both branches must have one type, and what an exchange returns varies between workers.
    tree = jax.tree.map(lambda x: vary(x, axis), tree)
    return lax.cond(step % every == every - 1, lambda tree: function(tree, step // every), lambda tree: tree, tree)
