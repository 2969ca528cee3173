"""Refuse, while a step is traced, what would hang on real links: a collective that some workers do not enter.

A walk over the traced program of one worker that follows, for every value, along which axes it may differ between
workers. Types would say it too (`shard_map(check_vma=True)`), at a price: see `workers._on_mesh`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from crossover_jax.axes import SAME, message_of_step, scan_arguments
from crossover_jax.traced import axes_of, inner_jaxprs

Differs = frozenset[str]  # the axes of workers along which a value may differ
SHARED: Differs = frozenset()
# Their result is the same for all who take part.
REDUCTIONS = ("psum", "pmax", "pmin", "all_gather")


def check_collectives(jaxpr: Any, differs: Sequence[Differs], axes: Iterable[str]) -> None:
    """Raise `ValueError` if a worker could skip, or choose, a collective over `axes` by a value of its own.

    `jaxpr` is the step of one worker; `differs` tells along which axes each of its arguments differs.
    """
    _flow(jaxpr, list(differs), frozenset(axes))


def depends_on_arguments(jaxpr: Any) -> list[bool]:
    """For each result of a traced program whether it depends on the values of its arguments, not on shapes alone."""
    outs, _ = _flow(jaxpr, [frozenset({"argument"})] * len(jaxpr.invars), SHARED)
    return [bool(out) for out in outs]


def _flow(jaxpr: Any, differs: Sequence[Differs], axes: Differs) -> tuple[list[Differs], list[Differs]]:
    """How the results differ, and how the arguments do afterwards: of those only references can have changed."""
    known: dict[Any, Differs] = dict(zip(jaxpr.invars, differs, strict=True))
    for eqn in jaxpr.eqns:
        outs, ins = _step(eqn, _read(known, eqn.invars), axes)
        known.update(zip(eqn.outvars, outs, strict=True))
        known.update((var, d) for var, d in zip(eqn.invars, ins, strict=True) if not hasattr(var, "val"))
    return _read(known, jaxpr.outvars), _read(known, jaxpr.invars)


def _read(known: dict[Any, Differs], variables: Sequence[Any]) -> list[Differs]:
    """Of literals and constants all workers have the same."""
    return [SHARED if hasattr(var, "val") else known.get(var, SHARED) for var in variables]


def _step(eqn: Any, ins: list[Differs], axes: Differs) -> tuple[list[Differs], list[Differs]]:
    name, params, count = eqn.primitive.name, eqn.params, len(eqn.outvars)
    if name == "cond":
        return _branches(eqn, ins, axes), ins
    if name == "while":
        return _while(eqn, ins, axes), ins
    if name == "scan":
        return _scan(eqn, ins, axes), ins
    if params.get("name") == SAME and ins[0]:
        raise ValueError(message_of_step(ins[0]))
    together = SHARED.union(*ins)
    if over := axes_of(params) & axes:
        is_shared = name.startswith(REDUCTIONS) and params.get("axis_index_groups") is None
        return [together - over if is_shared else together | over] * count, ins
    inner = list(inner_jaxprs(params))
    if len(inner) == 1 and len(inner[0].invars) == len(ins) and len(inner[0].outvars) == count:
        return _flow(inner[0], ins, axes)  # jit, checkpoint, custom derivatives, a nested shard_map
    for jaxpr in inner:  # whatever it does with them: what it reads may be all that it is given
        outs, _ = _flow(jaxpr, [together] * len(jaxpr.invars), axes)
        together = together.union(*outs)
    if name in ("swap", "addupdate"):  # the first argument is a reference, which now holds the others
        return [together] * count, [together, *ins[1:]]
    return [together] * count, ins


def _branches(eqn: Any, ins: list[Differs], axes: Differs) -> list[Differs]:
    chosen, *operands = ins
    branches = [_jaxpr(branch) for branch in eqn.params["branches"]]
    _refuse(branches, chosen, axes, "a condition")
    outs = [_flow(branch, operands, axes)[0] for branch in branches]
    return [chosen.union(*each) for each in zip(*outs, strict=True)]


def _while(eqn: Any, ins: list[Differs], axes: Differs) -> list[Differs]:
    condition, body = _jaxpr(eqn.params["cond_jaxpr"]), _jaxpr(eqn.params["body_jaxpr"])
    first, second = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    again = SHARED  # how "once more" differs

    def once(carry: list[Differs]) -> list[Differs]:
        nonlocal again
        again |= _flow(condition, [*ins[:first], *carry], axes)[0][0]
        return [out | again for out in _flow(body, [*ins[first:second], *carry], axes)[0]]

    carry = _until_stable(once, ins[second:])
    _refuse([condition, body], again, axes, "a loop")
    return carry


def _scan(eqn: Any, ins: list[Differs], axes: Differs) -> list[Differs]:
    body, (consts, carried) = _jaxpr(eqn.params["jaxpr"]), scan_arguments(eqn.params)
    end = consts + carried
    ys: list[Differs] = []

    def once(carry: list[Differs]) -> list[Differs]:
        outs = _flow(body, [*ins[:consts], *carry, *ins[end:]], axes)[0]
        ys[:] = outs[end - consts :]
        return outs[: end - consts]

    return _until_stable(once, ins[consts:end]) + ys


def _until_stable(once: Any, carry: list[Differs]) -> list[Differs]:
    while True:  # ends: each turn adds an axis somewhere, and there are one or two
        wider = [old | new for old, new in zip(carry, once(carry), strict=True)]
        if wider == carry:
            return carry
        carry = wider


def _refuse(jaxprs: list[Any], differs: Differs, axes: Differs, what: str) -> None:
    found = next((found for jaxpr in jaxprs for found in _collectives(jaxpr, axes)), None) if differs else None
    if found is not None:
        name, axis = found
        raise ValueError(
            f"`{name}` over axis {axis!r} must not stand in {what} that differs between workers: those that skip it "
            "leave the others waiting for ever. Decide alike on all workers, as by `jax.lax.pmin(ok, 'worker')`, or "
            "put the condition around what does not communicate: `optax.apply_if_finite` around the optimizer inside "
            "the algorithm, not around `as_optax`."
        )


def _collectives(jaxpr: Any, axes: Differs) -> Iterator[tuple[str, str]]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "axis_index" and (over := axes_of(eqn.params) & axes):
            yield eqn.primitive.name, min(over)
        for inner in inner_jaxprs(eqn.params):
            yield from _collectives(inner, axes)


def _jaxpr(program: Any) -> Any:
    return getattr(program, "jaxpr", program)
