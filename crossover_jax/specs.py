"""How one worker's values lie on its devices: PartitionSpecs over the inner axes of a mesh."""

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from crossover_jax.leaves import PyTree


def fsdp_specs(params: PyTree, mesh: Mesh, axis: str = "fsdp", *, min_size: int = 2**16) -> PyTree:
    """Specs that shard leaves of at least `min_size` elements over `axis`, by the largest dimension its size divides.

    Of equal dimensions the first is taken; other leaves, and all of them on a mesh without `axis`, lie whole on every
    device. `params` are one worker's, arrays or shapes.

    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("worker", "fsdp"))
    >>> shape = jax.ShapeDtypeStruct
    >>> specs = fsdp_specs({"kernel": shape((3, 512, 128), "f4"), "bias": shape((128,), "f4")}, mesh)
    >>> specs["kernel"] == P(None, "fsdp"), specs["bias"] == P()
    (True, True)
    """
    ways = mesh.shape.get(axis, 1)

    def spec(leaf: Any) -> P:
        shape = np.shape(leaf)
        fits = [d for d, length in enumerate(shape) if length and length % ways == 0]
        if ways == 1 or np.prod(shape) < min_size or not fits:
            return P()
        return P(*[None] * max(fits, key=lambda d: (shape[d], -d)), axis)

    return jax.tree.map(spec, params)


def on_mesh(specs: PyTree, mesh: Mesh) -> PyTree:
    """The specs without the axes that `mesh` lacks: a model's annotations may name more than a run uses.

    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    >>> on_mesh(P(("fsdp", "tensor"), "tensor"), mesh) == P("fsdp")
    True
    """

    def there(entry: Any) -> Any:
        names = tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name in mesh.shape)
        return names if len(names) > 1 else (names[0] if names else None)

    def restricted(spec: P) -> P:
        entries = [*map(there, spec)]
        while entries and entries[-1] is None:
            entries.pop()
        return P(*entries)

    return jax.tree.map(restricted, specs, is_leaf=lambda x: isinstance(x, P))


def state_specs(state: PyTree, params: PyTree, specs: PyTree) -> PyTree:
    """Specs for an algorithm's or optimizer's state: what mirrors a parameter lies as the parameter does.

    A leaf of `state` mirrors the parameter whose path in the tree its own path ends with, if their shapes are equal:
    momenta and second moments, inside masks and partitions too. All else (counters, factored moments, push-sum weights)
    lies whole on every device. `state` and `params` are one worker's, arrays or shapes: `jax.eval_shape(init, params)`.

    >>> import optax
    >>> params, specs = {"w": jax.ShapeDtypeStruct((8, 4), "f4")}, {"w": P("fsdp")}
    >>> state_specs(jax.eval_shape(optax.adam(1e-3).init, params), params, specs)[0].mu["w"] == P("fsdp")
    True
    """
    leaves = jax.tree.leaves_with_path(params)
    of_leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    known: dict[Hashable, P] = {(path, np.shape(x)): spec for (path, x), spec in zip(leaves, of_leaves, strict=True)}

    def spec(path: tuple, leaf: Any) -> P:
        ends = (known.get((path[i:], np.shape(leaf))) for i in range(len(path) + 1))
        return next((found for found in ends if found is not None), P())

    return jax.tree.map_with_path(spec, state)
