"""What messages say: a vector `x` is sent as `encode(x)`, and whoever decodes that gets Q(x) = `quantize(x)`."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from crossover_jax.leaves import widened

WIRES = ("float32", "bfloat16", "float16", "int8")
BLOCK = 256  # int8 values that share a scale


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

    def is_narrower(self, x: Array) -> bool:
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
        """
        if not self.is_narrower(x):
            return x
        if self.name == "int8":
            return self._encode_blocks(x)
        kind = jnp.finfo(self.name)
        x = jnp.clip(x, *(jnp.asarray(end, x.dtype) for end in (kind.min, kind.max)))
        # Not by a conversion alone: of one there and back the compiler may leave out both ("excess precision").
        nearest = lax.reduce_precision(x, kind.nexp, kind.nmant)
        bits = lax.bitcast_convert_type(nearest.astype(self.name), {16: jnp.uint16, 32: jnp.uint32}[kind.bits])
        if self.toward_zero:  # one less is the next number nearer to zero, whatever the sign
            bits = bits - (jnp.abs(nearest) > jnp.abs(x)).astype(bits.dtype)
        return bits

    def _encode_blocks(self, x: Array) -> Array:
        wide = widened(x.dtype)
        blocks = jnp.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK).astype(wide)
        # One number that is not finite must not spoil the scale of the 255 around it.
        blocks = jnp.where(jnp.isfinite(blocks), blocks, 0)
        largest = jnp.minimum(jnp.abs(blocks).max(1) / 127, jnp.asarray(jnp.finfo(jnp.float32).max / 127, wide))
        scale = largest.astype(jnp.float32)
        if self.toward_zero:
            scale = scale * jnp.float32(1 - 2**-22)  # 127 scales are then no more than the largest magnitude
        parts = blocks / jnp.where(scale == 0, 1, scale)[:, None].astype(wide)
        whole = jnp.clip(jnp.trunc(parts) if self.toward_zero else jnp.round(parts), -127, 127)
        if self.toward_zero:
            too_large = jnp.abs(whole * scale[:, None].astype(wide)) > jnp.abs(blocks)
            whole = jnp.where(too_large, whole - jnp.sign(whole), whole)
        coded = (whole.astype(jnp.int8).reshape(-1)[: x.size], scale)
        return jnp.concatenate([lax.bitcast_convert_type(y, jnp.uint8).reshape(-1) for y in coded])

    def decode(self, message: Array, x: Array) -> Array:
        """What a message says, Q(x), where `x` has the dtype and size of what it speaks of.

        >>> wire, x = Wire("int8"), jnp.array([127.0, 0.4, -3.6])
        >>> wire.decode(wire.encode(x), x).tolist(), wire.encode(x).nbytes
        ([127.0, 0.0, -4.0], 7)
        """
        if not self.is_narrower(x):
            return message
        if self.name == "int8":
            whole = lax.bitcast_convert_type(message[: x.size], jnp.int8).astype(widened(x.dtype))
            scale = lax.bitcast_convert_type(message[x.size :].reshape(-1, 4), jnp.float32).astype(whole.dtype)
            blocks = jnp.pad(whole, (0, -x.size % BLOCK)).reshape(-1, BLOCK)
            return (blocks * scale[:, None]).reshape(-1)[: x.size]
        return lax.bitcast_convert_type(message, jnp.dtype(self.name))

    def quantize(self, x: Array) -> Array:
        """Q(x), what a message says of `x`: `x` itself where nothing is lost."""
        return self.decode(self.encode(x), x) if self.is_narrower(x) else x
