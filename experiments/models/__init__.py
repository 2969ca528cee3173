"""Models of the experiments as pure functions: `build`, `apply`, `recalibrate`, and segments by module path.

Parameters and model state are plain nested dicts of arrays, without keys or counters, so that a leading axis of workers
can be put on every leaf. The names of parameters are paths such as 'layer1/0/conv1/kernel'.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.models.decoder import Decoder as Decoder
from experiments.models.decoder import decoder
from experiments.models.mlp import MLP as MLP
from experiments.models.mlp import mlp
from experiments.models.norm import MOMENTUM
from experiments.models.resnet import ResNet as ResNet
from experiments.models.resnet import imagenet_resnet, small_resnet
from experiments.models.segments import coarse as coarse
from experiments.models.segments import fine as fine

PyTree = Any
WEIGHTS = 0x57E16475  # sets the weights' key apart from those that are folded from `seed` by step and worker

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": mlp,
    "resnet8": partial(small_resnet, depth=8),
    "resnet14": partial(small_resnet, depth=14),
    "resnet20": partial(small_resnet, depth=20),
    "resnet32": partial(small_resnet, depth=32),
    "resnet44": partial(small_resnet, depth=44),
    "resnet56": partial(small_resnet, depth=56),
    "resnet18": partial(imagenet_resnet, depth=18),
    "resnet34": partial(imagenet_resnet, depth=34),
    "resnet50": partial(imagenet_resnet, depth=50),
    "decoder": decoder,
}


def build(
    name: str, *, num_classes: int, image_shape: Sequence[int], seed: int | jax.Array, **options: Any
) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """One worker's `(graphdef, params, model_state)` of the model called `name` in `MODELS`.

    `image_shape` is (height, width, channels), or (sequence,) of text; `options` go to the constructor. `params` and
    `model_state` are nested dicts of float32 arrays, `model_state` the BatchNorm statistics and empty for models
    without. The graphdef is static and can be hashed; `jax.eval_shape(lambda: build(...)[1:])` gives shapes without
    computing anything. Raises `ValueError` for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"`name` must be one of {', '.join(MODELS)}, got {name!r}.")
    # A stream of its own: the first step's dropout masks, drawn from the same bits as the weights, follow the weights.
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), WEIGHTS))
    model = MODELS[name](num_classes=num_classes, image_shape=image_shape, rngs=rngs, **options)
    graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)


def apply(
    graphdef: nnx.GraphDef,
    params: PyTree,
    model_state: PyTree,
    images: jax.Array,
    *,
    train: bool,
    key: jax.Array | None,
) -> tuple[jax.Array, PyTree]:
    """Float32 logits `[batch, classes]` of one worker's images `[batch, height, width, channels]`, and its new state.

    A decoder's, of tokens `[batch, sequence]`, are `[batch, sequence, classes]`.

    With `train`, BatchNorm uses the batch's statistics and moves the running ones, and dropout draws from `key`;
    without, the state comes back unchanged and `key` may be None. Differentiable in `params`. A pure function of one
    worker's values: give every worker its own `key`, or all drop the same units. Raises `ValueError` where dropout
    has no key and where `bn_groups` does not divide the batch.
    """
    # A copy, because variables may not be changed at another trace level than the one that made them.
    model = nnx.merge(graphdef, params, model_state, copy=True)
    logits = model(images, train=train, key=key)
    return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)) if train else model_state


def annotations(graphdef: nnx.GraphDef, params: PyTree, model_state: PyTree) -> PyTree | None:
    """Over which axes inside a worker the model's author would split each parameter; None where he does not say.

    A tree like `params` of PartitionSpecs over the axes "fsdp" and "tensor", P() for what should lie whole on every
    device. They are without the axis of workers, which comes first. The mesh need not have both axes, and a spec does
    not promise that the size divides. The arguments are those of `apply`; shapes will do for arrays.
    """
    model = nnx.merge(graphdef, params, model_state, copy=True)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model, nnx.Param)))
    return specs if any(spec != P() for spec in jax.tree.leaves(specs)) else None


def recalibrate(
    forward: Callable[[PyTree, jax.Array], PyTree], model_state: PyTree, batches: Iterable[jax.Array]
) -> PyTree:
    """Model state whose running statistics are those of each layer's inputs over all `batches` together.

    `forward` takes model state and images `[batch, height, width, channels]` to the state that they move it to in
    training; `batches` of one size count equally and compile once. Variances are the mean of the batches' plus the
    variance of their means. The average of the workers' parameters is a model that no worker ran, so the statistics of
    none fit it. Evaluation's default is the average of the workers' running statistics; this is the exact, dearer
    alternative. A model without BatchNorm gets its empty state back. Raises `ValueError` without batches.

    Reference: Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3 (PreciseBN).
    """
    if not jax.tree.leaves(model_state):
        return model_state
    zero, moved = jax.tree.map(jnp.zeros_like, model_state), jax.jit(forward)
    seen = [jax.device_get(moved(zero, images)) for images in batches]
    if not seen:
        raise ValueError("`batches` must hold at least one batch, got none.")
    # From zero, a running statistic moves to (1 - MOMENTUM) of the batch's.
    stacked = jax.tree.map(lambda *x: np.stack(x).astype(np.float64) / (1 - MOMENTUM), *seen)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), _together(stacked), model_state)


def _together(batches: PyTree) -> PyTree:
    """Means and variances of equal batches, `[batches, features]`, as those of all of them.

    >>> _together({"norm": {"mean": np.array([[0.0], [2.0]]), "var": np.array([[1.0], [3.0]])}})
    {'norm': {'mean': array([1.]), 'var': array([3.])}}
    """
    if "mean" in batches:
        return {"mean": batches["mean"].mean(0), "var": batches["var"].mean(0) + batches["mean"].var(0)}
    return {name: _together(below) for name, below in batches.items()}
