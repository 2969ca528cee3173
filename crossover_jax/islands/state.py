"""A whole training state on its way to a newcomer: copied on the devices, in bytes, laid out as the newcomer's."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from crossover_jax.islands.payload import digest
from crossover_jax.islands.stream import Head
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


def longest_of(state: PyTree) -> int:
    """Bytes of a whole state."""
    return sum(x.size * x.dtype.itemsize for x in jax.eval_shape(copied, state))


def check_state(head: Head, like: PyTree, peer: str) -> None:
    """Raise `ValueError` for a peer's state that is none of this island's."""
    if head.get("digest") != digest_of(like):
        raise ValueError(
            f"the state of island {peer!r} must have the names, shapes and dtypes of this one's, and has others: start "
            "all islands with the same model and optimizer."
        )


def has_nan(body: Any, like: PyTree) -> bool:
    """Whether a number in the bytes of a state is none; infinite ones have their place in some optimizers."""
    values = _values(body, like)
    return any(bool(np.isnan(x).any()) for x in values if jnp.issubdtype(x.dtype, jnp.inexact))


def _values(body: Any, like: PyTree) -> Iterator[np.ndarray]:
    start = 0
    for words in jax.eval_shape(copied, like):
        value = np.frombuffer(body, words.dtype, words.size, start).reshape(words.shape)
        start += value.nbytes
        yield value


def state_of(body: Any, like: PyTree) -> PyTree:
    """The state whose `copied` leaves these bytes are, laid out as `like`."""
    leaves, tree = jax.tree.flatten(like)
    found: list[Any] = []
    for leaf, value in zip(leaves, _values(body, like), strict=True):
        if _is_typed(leaf):
            found.append(jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf)))
        else:
            found.append(_placed(value, leaf.sharding) if isinstance(leaf, jax.Array) else value)
    return tree.unflatten(found)


def _placed(value: np.ndarray, sharding: jax.sharding.Sharding) -> Array:
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index], dtype=value.dtype)


def _is_typed(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
