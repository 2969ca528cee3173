"""The leaves of a tree: their names, which of them can be averaged, and which are random keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class OwnGradient(NamedTuple):
    """A gradient of one worker in an optimizer's state: it looks like momentum, but is of no use to another worker."""

    tree: PyTree


def is_own_gradient(node: Any) -> bool:
    return isinstance(node, OwnGradient)


def flatten(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Names "layers/0/kernel", leaves and structure of a tree.

    The attribute `value` in which flax.nnx keeps the array of a Variable is no part of the name.
    """
    names = []
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_variable):
        inner = jax.tree.leaves_with_path(node) if is_variable(node) else [((), node)]
        names += [_name(path) if len(inner) == 1 else _name(path + below) for below, _ in inner]
    leaves, treedef = jax.tree.flatten(tree)
    return names, leaves, treedef


def is_variable(node: Any) -> bool:
    """Whether a node is a Variable of flax.nnx, known by its name because the library does not import flax."""
    return any(kind.__name__ == "Variable" and kind.__module__.startswith("flax.") for kind in type(node).__mro__)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def travels(leaf: Any) -> bool:
    """Floating-point and complex leaves can be averaged; counters, flags and random keys stay at home."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jax.dtypes.issubdtype(dtype, np.inexact)


def widened(dtype: Any) -> Any:
    """The dtype in which values are averaged: float32 for the narrower ones, whose averages would stall."""
    return dtype if jnp.finfo(dtype).bits >= 32 else np.dtype(np.float32)


def is_key(leaf: Any, leading: int = 0) -> bool:
    """Whether a leaf holds random keys: typed ones, or behind `leading` dimensions one `jax.random.PRNGKey(0)`.

    >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0)), is_key(jnp.zeros(2))
    (True, True, False)
    """
    dtype = jnp.result_type(leaf)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    # Nothing but its shape tells an older key from integers: uint32[2] for threefry, uint32[4] for rbg.
    older = jax.eval_shape(jax.random.PRNGKey, 0)
    return dtype == older.dtype and np.shape(leaf)[leading:] == older.shape


def fold_in(keys: jax.Array, worker: Any, purpose: int = 0x776F726B) -> jax.Array:
    """Other keys for every worker but the first, which keeps its own: one worker alone draws what it always drew."""
    is_older = not jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key)
    typed = jax.random.wrap_key_data(keys) if is_older else keys

    def folded(key: jax.Array) -> jax.Array:
        # The constant keeps worker i from drawing what the first draws in a loop that folds the step i into its key.
        return jax.random.fold_in(jax.random.fold_in(key, purpose), worker)

    others = jax.vmap(folded)(typed.reshape(-1)).reshape(typed.shape)
    return jnp.where(worker == 0, keys, jax.random.key_data(others) if is_older else others)
