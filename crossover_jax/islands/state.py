"""A whole training state on its way to a newcomer: copied on the devices, in bytes, laid out as the newcomer's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from crossover_jax.islands.payload import digest
from crossover_jax.islands.transport import Head
from crossover_jax.leaves import PyTree, flatten


def on_host(arrays: PyTree) -> PyTree:
    """Arrays in the host's memory; what they were made from may be donated meanwhile."""
    return jax.tree.map(np.asarray, arrays)


def copied(state: PyTree) -> list[Array]:
    """Copies of all leaves, on the devices; of random keys, their words."""
    return [jnp.copy(jax.random.key_data(x) if _is_typed(x) else jnp.asarray(x)) for x in jax.tree.leaves(state)]


def digest_of(state: PyTree) -> str:
    """What two islands' states must have in common: names, shapes and dtypes."""
    names, leaves, _ = flatten(state)
    return digest([[name, list(np.shape(x)), str(jnp.result_type(x))] for name, x in zip(names, leaves, strict=True)])


def state_from(head: Head, body: bytearray, like: PyTree, peer: str) -> PyTree:
    """A peer's state, laid out as `like`."""
    if head.get("digest") != digest_of(like):
        raise ValueError(
            f"the state of island {peer!r} must have the names, shapes and dtypes of this one's, and has others: start "
            "all islands with the same model and optimizer."
        )
    leaves, tree = jax.tree.flatten(like)
    found, start = [], 0
    for leaf, words in zip(leaves, jax.eval_shape(copied, like), strict=True):
        value = np.frombuffer(body, words.dtype, words.size, start).reshape(words.shape)
        start += value.nbytes
        if _is_typed(leaf):
            found.append(jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf)))
        else:
            found.append(jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value)
    return tree.unflatten(found)


def _is_typed(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
