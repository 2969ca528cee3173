"""Many steps as one program, in which an exchange can be under way while they are computed."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from crossover_jax.leaves import PyTree
from crossover_jax.steps import Place, Step, tracing_at

OneStep = Callable[[PyTree, PyTree, Step], tuple[PyTree, PyTree]]


def period(step: OneStep, length: int) -> OneStep:
    """`(state, batches, first) -> (state, outputs)`: `length` steps of one worker as one program.

    `step(state, batch, t)` is the step of one worker; leaves of `batches` and of what comes out are `[length, ...]`.
    It is called with t = first, first + 1, …, so learning rates, dropout keys and data are those of single steps.
    `first`, the same on all workers, is the number of steps before: a multiple of `length`, not checked where traced.

    What a step does `every` so many steps (`outer`, `every`, `local_sgd`) costs no conditional where that is `length`:
    the exchange stands once, behind the last step. With `outer(..., overlap=True)` it needs only what the period began
    with: on TPUs it starts before the loop over the steps and ends behind it (docs/language_models.md).

    The step must hand on `t` itself, as `algorithm.update(grads, state, params, t)`, or `step=t` to `as_optax`. The
    last step is compiled on its own if it differs from the others, so compilation takes up to twice as long.
    Raises `ValueError` for `length` below 1, and for batches of another length.

    >>> import optax
    >>> from crossover_jax import average, outer, per_worker
    >>> algorithm = outer(optax.sgd(1.0), None, average(), every=2)
    >>> def step(state, grad, t):
    ...     return algorithm.update(grad, state[1], state[0], t), state[0]
    >>> state = jax.vmap(lambda x: (x, algorithm.init(x)))(jnp.zeros(4))
    >>> grads = jnp.stack([jnp.arange(4.0)] * 2, axis=1)
    >>> (x, _), before = per_worker(period(step, 2), 4, replicated=(2,))(state, grads, 0)
    >>> x.tolist(), before[3].tolist()
    ([-3.0, -3.0, -3.0, -3.0], [0.0, -3.0])
    """
    if length < 1:
        raise ValueError(f"`length` must be at least 1, got {length}.")

    def run(state: PyTree, batches: PyTree, first: Step) -> tuple[PyTree, PyTree]:
        _check_length(batches, length)
        if isinstance(first, int) and first % length:
            raise ValueError(f"`first` must be a multiple of `length` = {length}, got {first}.")
        was_asked = False

        def at(is_last: bool, state: PyTree, own: tuple[PyTree, jax.Array]) -> tuple[PyTree, PyTree]:
            nonlocal was_asked
            batch, i = own
            t = first + i
            place = Place(t, length, is_last)
            with tracing_at(place):
                state, outputs = step(state, batch, t)
            was_asked |= place.was_asked
            return state, outputs

        numbers = jnp.arange(length, dtype=jnp.result_type(first))
        all_own = (batches, numbers)
        before, last = jax.tree.map(lambda x: x[:-1], all_own), jax.tree.map(lambda x: x[-1], all_own)
        jax.eval_shape(partial(at, False), state, last)
        if not was_asked:  # every step is the same program
            return lax.scan(partial(at, False), state, all_own)
        state, outputs = lax.scan(partial(at, False), state, before)
        state, of_last = at(True, state, last)
        return state, jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), outputs, of_last)

    return run


def _check_length(batches: PyTree, length: int) -> None:
    for leaf in jax.tree.leaves(batches):
        if leaf.shape[:1] != (length,):
            raise ValueError(
                f"`batches` must hold `length` = {length} batches, got a leaf of shape {leaf.shape} in each worker: "
                "stack them behind the workers, [workers, length, ...]."
            )
