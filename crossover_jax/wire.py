"""What messages say: a vector `x` is sent as `encode(x)`, and whoever decodes that gets Q(x) = `quantize(x)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from crossover_jax.leaves import widened

WIRES = ("float32", "bfloat16", "float16", "int8", "int4")
BLOCK = 256  # integers that share a scale
LARGEST = {"int8": 127, "int4": 7}  # the integers go from minus this to this


def check_wire(name: str | None) -> None:
    """Raise `ValueError` for a wire that there is not."""
    if name not in (None, *WIRES):
        raise ValueError(f"`wire` must be None or one of {', '.join(WIRES)}, got {name!r}.")


class Wire(NamedTuple):
    """The dtype of messages, and whether Q(x) lies between 0 and x (`toward_zero`) or is the nearest there is.

    A worker keeps x − (1 − s) Q(x) of its own, s its own share. Where s is ½ or more, the nearest Q leaves that on x's
    side of zero; below, only a Q with |Q(x)| ≤ |x| does. What is finite is never sent as infinity.
    """

    name: str | None = None
    toward_zero: bool = False

    def is_narrower(self, x: Array | jax.ShapeDtypeStruct) -> bool:
        """Whether messages say less than the vector `x`."""
        return (
            self.name is not None
            and jnp.issubdtype(x.dtype, jnp.floating)
            and jnp.dtype(self.name).itemsize < x.dtype.itemsize
            and x.size > 0
        )

    def encode(self, x: Array) -> Array:
        """What is sent of the vector `x`: itself, or bits, for a CPU would send a bfloat16 as a float32.

        int8 is a byte for each value, then a float32 scale for every `BLOCK` of them, their largest magnitude / 127.
        int4 is half a byte for each, the second half of the values in the upper bits, and a scale of 1/7.
        """
        if not self.is_narrower(x):
            return x
        if self.name in LARGEST:
            return self._encode_blocks(x, LARGEST[self.name])
        kind = jnp.finfo(self.name)
        x = jnp.clip(x, *(jnp.asarray(end, x.dtype) for end in (kind.min, kind.max)))
        # Not by a conversion alone: of one there and back the compiler may leave out both ("excess precision").
        nearest = lax.reduce_precision(x, kind.nexp, kind.nmant)
        bits = lax.bitcast_convert_type(nearest.astype(self.name), {16: jnp.uint16, 32: jnp.uint32}[kind.bits])
        if self.toward_zero:  # one less is the next number nearer to zero, whatever the sign
            bits = bits - (jnp.abs(nearest) > jnp.abs(x)).astype(bits.dtype)
        return bits

    def _encode_blocks(self, x: Array, most: int) -> Array:
        wide = widened(x.dtype)
        blocks = jnp.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK).astype(wide)
        # One number that is not finite must not spoil the scale of the 255 around it.
        blocks = jnp.where(jnp.isfinite(blocks), blocks, 0)
        largest = jnp.minimum(jnp.abs(blocks).max(1) / most, jnp.asarray(jnp.finfo(jnp.float32).max / most, wide))
        scale = largest.astype(jnp.float32)
        if self.toward_zero:
            scale = scale * jnp.float32(1 - 2**-22)  # so many scales are then no more than the largest magnitude
        parts = blocks / jnp.where(scale == 0, 1, scale)[:, None].astype(wide)
        whole = jnp.clip(jnp.trunc(parts) if self.toward_zero else jnp.round(parts), -most, most)
        if self.toward_zero:
            too_large = jnp.abs(whole * scale[:, None].astype(wide)) > jnp.abs(blocks)
            whole = jnp.where(too_large, whole - jnp.sign(whole), whole)
        whole = whole.astype(jnp.int8).reshape(-1)[: x.size]
        coded = (_halved(whole) if self.name == "int4" else whole, scale)
        return jnp.concatenate([lax.bitcast_convert_type(y, jnp.uint8).reshape(-1) for y in coded])

    def decode(self, message: Array, x: Array | jax.ShapeDtypeStruct) -> Array:
        """What a message says, Q(x), where `x` has the dtype and size of what it speaks of.

        >>> wire, x = Wire("int8"), jnp.array([127.0, 0.4, -3.6])
        >>> wire.decode(wire.encode(x), x).tolist(), wire.encode(x).nbytes
        ([127.0, 0.0, -4.0], 7)
        """
        if not self.is_narrower(x):
            return message
        if self.name not in LARGEST:
            return lax.bitcast_convert_type(message, jnp.dtype(self.name))
        size = -(-x.size // 2) if self.name == "int4" else x.size
        whole = lax.bitcast_convert_type(message[:size], jnp.int8)
        whole = (_whole(whole)[: x.size] if self.name == "int4" else whole).astype(widened(x.dtype))
        scale = lax.bitcast_convert_type(message[size:].reshape(-1, 4), jnp.float32).astype(whole.dtype)
        blocks = jnp.pad(whole, (0, -x.size % BLOCK)).reshape(-1, BLOCK)
        return (blocks * scale[:, None]).reshape(-1)[: x.size]

    def quantize(self, x: Array) -> Array:
        """Q(x), what a message says of `x`: `x` itself where nothing is lost."""
        return self.decode(self.encode(x), x) if self.is_narrower(x) else x


def _halved(whole: Array) -> Array:
    """Integers from −8 to 7 by twos in one int8: the second half of them stands in the upper bits."""
    lower, upper = jnp.pad(whole, (0, whole.size % 2)).reshape(2, -1)
    return (lower & 15) | (upper << 4)


def _whole(halved: Array) -> Array:
    return jnp.concatenate([(halved << 4) >> 4, halved >> 4])  # a shift of an int8 to the right keeps its sign
