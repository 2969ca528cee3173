"""A decoder-only transformer whose layers are scanned: compile time does not grow with depth.

Every parameter of the layers is one array with a leading axis of layers, 'layers/query' and so on, and says over which
of a worker's axes it may be split: "fsdp" or "tensor" (`models.annotations`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike


class Decoder(nnx.Module):
    """Maps tokens `[batch, sequence]` to float32 logits `[batch, sequence, num_classes]` of each one's successor.

    Pre-norm layers of causal attention and SwiGLU, RMSNorm, rotary positions, no biases, a head of its own. Computes in
    `dtype`, keeps parameters in float32. `remat` keeps only the layers' inputs for the gradient and computes the rest
    again. Kernels start normal with variance 1 / (fan in), divided by 2 `num_layers` where they write into the residual
    stream. Raises `ValueError` if `num_heads` does not cut `width` into heads of even size.

    Reference: Touvron et al., LLaMA, arXiv:2302.13971, section 2.2.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        num_layers: int,
        width: int,
        num_heads: int,
        mlp_width: int,
        remat: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        if width % (2 * num_heads):
            raise ValueError(
                f"`num_heads` must cut `width` into heads of even size, got {num_heads} and a width of {width}."
            )
        self.remat, self.dtype = remat, dtype
        heads, residual = (num_heads, width // num_heads), 1 / math.sqrt(2 * num_layers)

        def kernel(*shape: int, fan_in: int, spec: tuple[str | None, ...], scale: float = 1.0) -> nnx.Param:
            values = jax.random.normal(rngs.params(), shape, jnp.float32) * (scale / math.sqrt(fan_in))
            # Not eager: flax would constrain the values to the axes at once, where there need not be any.
            return nnx.Param(values, out_sharding=spec, eager_sharding=False)

        def layers(*shape: int, spec: tuple[str | None, ...], **how: Any) -> nnx.Param:
            return kernel(num_layers, *shape, spec=(None, *spec), **how)

        def ones(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.ones(shape, jnp.float32))

        self.embedding = kernel(num_classes, width, fan_in=1, spec=("tensor", "fsdp"))
        self.layers = nnx.Dict(
            attention_norm=ones(num_layers, width),
            query=layers(width, *heads, fan_in=width, spec=("fsdp", "tensor", None)),
            key=layers(width, *heads, fan_in=width, spec=("fsdp", "tensor", None)),
            value=layers(width, *heads, fan_in=width, spec=("fsdp", "tensor", None)),
            out=layers(*heads, width, fan_in=width, scale=residual, spec=("tensor", None, "fsdp")),
            mlp_norm=ones(num_layers, width),
            gate=layers(width, mlp_width, fan_in=width, spec=("fsdp", "tensor")),
            up=layers(width, mlp_width, fan_in=width, spec=("fsdp", "tensor")),
            down=layers(mlp_width, width, fan_in=mlp_width, scale=residual, spec=("tensor", "fsdp")),
        )
        self.norm = ones(width)
        self.head = kernel(width, num_classes, fan_in=width, spec=("fsdp", None))

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        del train, key
        # Inside a scan nothing merges what is computed twice, so `remat` needs no barriers against it.
        one = jax.checkpoint(layer, prevent_cse=False) if self.remat else layer
        # As a product, which the compiler can split as annotated: of a lookup that is split both ways it fails.
        embedding = self.embedding[...].astype(self.dtype)
        x = jax.nn.one_hot(x, len(embedding), dtype=self.dtype) @ embedding
        stack = {name: p[...] for name, p in self.layers.items()}
        x, _ = lax.scan(lambda x, p: (one(x, p), None), x, stack)
        x, head = rms_norm(x, self.norm[...]), self.head[...].astype(self.dtype)
        return jnp.matmul(x, head, preferred_element_type=jnp.float32)


def layer(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); `x` is `[batch, sequence, width]`."""
    p = {name: value if name.endswith("norm") else value.astype(x.dtype) for name, value in p.items()}
    x = split_by_examples(x)
    y = rms_norm(x, p["attention_norm"])
    q, k, v = (jnp.einsum("bsw,whd->bshd", y, p[name]) for name in ("query", "key", "value"))
    y = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    x = x + jnp.einsum("bshd,hdw->bsw", y, p["out"])
    y = rms_norm(x, p["mlp_norm"])
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def split_by_examples(x: jax.Array) -> jax.Array:
    """`x` with its examples over all devices of a worker but those of "tensor", where their number divides.

    Told nothing, the compiler splits the sum over "fsdp" that parameters are sharded along, and sends activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in mesh.axis_names if name not in (*mesh.manual_axes, "tensor"))
    ways = math.prod(mesh.shape[name] for name in axes)
    return lax.with_sharding_constraint(x, P(axes)) if axes and len(x) % ways == 0 else x


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x` of root mean square 1 over its last axis, times `scale`; computes in float32.

    Reference: Zhang and Sennrich, arXiv:1910.07467, equation 4.
    """
    wide = x.astype(jnp.float32)
    normal = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (normal * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def rotated(x: jax.Array) -> jax.Array:
    """Turn pairs (i, i + d/2) of a head's d features by position * 10000^(-2i/d): scores depend on distances alone.

    `x` is `[batch, sequence, heads, d]`. Reference: Su et al., RoFormer, arXiv:2104.09864, equation 34.
    """
    _, sequence, _, size = x.shape
    frequency = 10_000.0 ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle = jnp.outer(jnp.arange(sequence, dtype=jnp.float32), frequency).reshape(1, sequence, 1, -1)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def decoder(
    *,
    num_classes: int,
    image_shape: Sequence[int],
    rngs: nnx.Rngs,
    num_layers: int = 4,
    width: int = 128,
    num_heads: int = 4,
    mlp_width: int = 384,
    remat: bool = False,
    dtype: DTypeLike = "float32",
) -> Decoder:
    """Decoder of `num_classes` tokens; for any length of sequence, as its positions are relative."""
    del image_shape
    return Decoder(
        num_classes=num_classes,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        mlp_width=mlp_width,
        remat=remat,
        dtype=dtype,
        rngs=rngs,
    )
