"""What a program of one worker does, read from its trace: the bytes that it sends.

A function is traced on the values or shapes of one worker, not run. What is in a `scan` counts as often as it runs,
what is in a `while` once, and of the branches of a conditional the dearest.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from jax.extend import core
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

Equation = Any  # `jax.extend.core.JaxprEqn`, to whose declared types shapes are unknown
_FREE = ("axis_index", "pvary")  # of what names an axis: these send nothing


def trace_worker(function: Callable[..., Any], *args: Any, axes: dict[str, int]) -> core.ClosedJaxpr:
    """The jaxpr of `function` as one worker of a mesh runs it, with the arrays that it reads as its constants.

    `axes` names the axes that `function` expects around it, with their sizes; no such devices are needed.

    >>> import jax.numpy as jnp
    >>> traced = trace_worker(lambda x: jax.lax.pmean(x, "worker"), jnp.zeros(3), axes={"worker": 4})
    >>> [eqn.primitive.name for eqn in traced.eqns]
    ['psum', 'div']
    """
    if not axes:
        return jax.make_jaxpr(function)(*args)
    mesh = AbstractMesh((*axes.values(),), (*axes,))
    # Only `shard_map` makes axes manual, by which an exchange tells a mesh from `vmap`. Without replication types, as
    # in `per_worker`, a trace has no casts between them.
    on_mesh = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # a mesh of the caller's (`set_mesh`) would be refused
        outer = jax.make_jaxpr(on_mesh)(*jax.tree.map(_without_place, args))
    (eqn,) = outer.eqns
    # What the function closes over enters the body as arguments, which the outer jaxpr alone knows to be constants.
    values = dict(zip(outer.jaxpr.constvars, outer.consts, strict=True))
    held = {v: values[o] for v, o in zip(eqn.params["jaxpr"].invars, eqn.invars, strict=True) if o in values}
    free = [v for v in eqn.params["jaxpr"].invars if v not in held]
    return core.ClosedJaxpr(eqn.params["jaxpr"].replace(constvars=[*held], invars=free), [*held.values()])


def wire_bytes(function: Callable[..., Any], *args: Any, axis: str = "worker", num_workers: int) -> float:
    """Bytes that one worker sends over `axis` in one call of `function`, averaged over the workers.

    A permute counts its message for each pair that is not a fixed point, an all-reduce 2 (n − 1)/n times its operand,
    as on a ring. With a Python integer as `step`, `gossip` makes no conditional. Unknown collectives: `ValueError`.

    >>> import jax.numpy as jnp
    >>> from crossover_jax.mixing import average
    >>> wire_bytes(lambda x: average()(x, 0), jnp.zeros(100), num_workers=4)
    600.0
    """
    return total(trace_worker(function, *args, axes={axis: num_workers}).jaxpr, partial(_sent, axis, num_workers))


def _without_place(x: Any) -> Any:
    if not hasattr(x, "sharding"):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))


def total(jaxpr: core.Jaxpr, cost: Callable[[Equation], float]) -> float:
    """The sum of `cost(eqn)` over the equations of a jaxpr and of all jaxprs in it, as often as they run."""
    summed = 0.0
    for eqn in jaxpr.eqns:
        inside = [total(inner, cost) for inner in inner_jaxprs(eqn.params)]
        if eqn.primitive.name == "cond":
            summed += max(inside)
        else:
            summed += cost(eqn) + sum(inside) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return summed


def inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Those of jit, remat, loops, `shard_map` and functions with a rule of their own, whatever the parameter is called.

    Rules for derivatives are not among them: they are functions until somebody differentiates.
    """
    for value in params.values():
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                yield inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner


def _sent(axis: str, n: int, eqn: Equation) -> float:
    name, params = eqn.primitive.name, eqn.params
    if axis not in axes_of(params) or name in _FREE:
        return 0.0
    size = sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars)
    if name == "ppermute":
        return size * sum(i != j for i, j in params["perm"]) / n
    if name.startswith(("psum", "pmax", "pmin")):
        return size * 2 * (n - 1) / n
    if name.startswith("all_gather"):
        return float(size * (n - 1))
    raise ValueError(f"`wire_bytes` knows ppermute, psum, pmax, pmin and all_gather, got {name} over axis {axis!r}.")


def axes_of(params: dict[str, Any]) -> frozenset[str]:
    """The axes that a primitive communicates over."""
    names = params.get("axes", params.get("axis_name", ()))
    return frozenset(n for n in (names if isinstance(names, tuple) else (names,)) if isinstance(n, str))
