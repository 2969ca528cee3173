"""What messages say: a vector `x` is sent as `encode(x)`, and whoever `decode`s that gets Q(x) = `said(x)`."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from crossover_jax.cuts import widened

WIRES = ("float32", "bfloat16", "float16", "int8")
BLOCK = 256  # int8 values that share a scale


def check_wire(wire: str | None) -> None:
    """Raise `ValueError` for a wire that there is not."""
    if wire not in (None, *WIRES):
        raise ValueError(f"`wire` must be None or one of {', '.join(WIRES)}, got {wire!r}.")


def is_narrower(x: Array, wire: str | None) -> bool:
    """Whether messages in `wire` say less than the vector `x`."""
    return (
        wire is not None
        and jnp.issubdtype(x.dtype, jnp.floating)
        and jnp.dtype(wire).itemsize < x.dtype.itemsize
        and x.size > 0
    )


def encode(x: Array, wire: str | None) -> Array:
    """What is sent of the vector `x`: itself, or bits, for a CPU would send a bfloat16 as a float32.

    int8 is a byte for each value, then a float32 scale for every `BLOCK` of them, their largest magnitude / 127.
    """
    if not is_narrower(x, wire):
        return x
    if wire == "int8":
        blocks = jnp.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK).astype(widened(x.dtype))
        scale = (jnp.abs(blocks).max(1) / 127).astype(jnp.float32)
        whole = jnp.round(blocks / jnp.where(scale == 0, 1, scale)[:, None].astype(blocks.dtype)).astype(jnp.int8)
        coded = (whole.reshape(-1)[: x.size], scale)
        return jnp.concatenate([lax.bitcast_convert_type(y, jnp.uint8).reshape(-1) for y in coded])
    # Not by a conversion alone: of one there and back the compiler may leave out both ("excess precision").
    kind = jnp.finfo(wire)
    bits = {16: jnp.uint16, 32: jnp.uint32}[kind.bits]
    return lax.bitcast_convert_type(lax.reduce_precision(x, kind.nexp, kind.nmant).astype(wire), bits)


def decode(message: Array, x: Array, wire: str | None) -> Array:
    """What a message says, Q(x), where `x` has the dtype and size of what it speaks of.

    >>> x = jnp.array([127.0, 0.4, -3.6])
    >>> decode(encode(x, "int8"), x, "int8").tolist(), encode(x, "int8").nbytes
    ([127.0, 0.0, -4.0], 7)
    """
    if not is_narrower(x, wire):
        return message
    if wire == "int8":
        whole = lax.bitcast_convert_type(message[: x.size], jnp.int8).astype(widened(x.dtype))
        scale = lax.bitcast_convert_type(message[x.size :].reshape(-1, 4), jnp.float32).astype(whole.dtype)
        blocks = jnp.pad(whole, (0, -x.size % BLOCK)).reshape(-1, BLOCK)
        return (blocks * scale[:, None]).reshape(-1)[: x.size]
    return lax.bitcast_convert_type(message, jnp.dtype(wire))


def said(x: Array, wire: str | None) -> Array:
    """Q(x), what a message says of `x`: `x` itself where nothing is lost."""
    return decode(encode(x, wire), x, wire)
