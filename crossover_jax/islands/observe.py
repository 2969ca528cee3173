"""Islands seen from outside: who is there and how they are, and the mean of their parameters."""

import asyncio
import time

from crossover_jax.cuts import whole
from crossover_jax.islands.heads import hosts_in
from crossover_jax.islands.layout import Layout
from crossover_jax.islands.node import PARAMS, Node
from crossover_jax.islands.payload import Payload
from crossover_jax.islands.roster import OBSERVER, Roster
from crossover_jax.islands.stream import Head, LinkError
from crossover_jax.islands.transport import Tcp, Tls
from crossover_jax.leaves import PyTree

_NOTHING = Layout("", "", (), lambda segment, offered, mine, theirs: offered, lambda segment, bits: 0.0)


def look(roster: Roster, *, tls: Tls | None, timeout: float = 10.0) -> dict[str, Head]:
    """What each island of the roster says of itself, by name; {"error": ...} of one that does not answer."""
    return asyncio.run(_look(roster, tls, timeout))


def gather_mean(roster: Roster, *, like: PyTree, tls: Tls | None, timeout: float = 10.0) -> PyTree:
    """The mean of all islands' parameters, to evaluate and to keep; it changes nothing in them.

    `like` has the names, shapes and dtypes of the parameters; leaves that do not travel are taken from it. Each island
    hands over what it has after its next exchange. One that does not answer is left out. Raises `LinkError` if none
    does.
    """
    payload = Payload(like, whole(), None)
    bodies = asyncio.run(_gather(roster, payload, tls, timeout))
    return payload.mean(like, bodies)


async def _look(roster: Roster, tls: Tls | None, timeout: float) -> dict[str, Head]:
    node = _observer(_NOTHING, tls, timeout)
    found: dict[str, Head] = {}

    async def of_host(name: str, i: int, address: str) -> dict[str, str]:
        try:
            said = (await node.status(name, address)).get("errors")
        except LinkError as error:
            return {f"host {i}": str(error)}
        return {f"{peer}, host {i}": why for peer, why in said.items()} if isinstance(said, dict) else {}

    async def ask(name: str, address: str) -> None:
        try:
            head = await node.status(name, address)
            found[head["from"]] = head
            for i, other in enumerate(hosts_in(head)[1:16], 1):
                said = head.get("errors")
                head["errors"] = (said if isinstance(said, dict) else {}) | await of_host(head["from"], i, other)
        except LinkError as error:
            found[name] = {"error": str(error)}

    await asyncio.gather(*(ask(name, address) for name, address in roster.members().items()))
    await node.transport.close()
    return dict(sorted(found.items()))


async def _gather(roster: Roster, payload: Payload, tls: Tls | None, timeout: float) -> list[bytearray]:
    node = _observer(payload.layout, tls, timeout)
    bodies: list[bytearray] = []
    errors: list[Exception] = []

    async def fetch(name: str, address: str) -> None:
        try:
            _, body = await node.fetch(name, PARAMS, payload.num_bytes, address)
            bodies.append(body)
        except LinkError as error:
            errors.append(error)

    await asyncio.gather(*(fetch(name, address) for name, address in roster.members().items()))
    await node.transport.close()
    if not bodies:
        raise LinkError(f"no island has handed over its parameters: {errors or 'the roster is empty'}")
    return bodies


def _observer(layout: Layout, tls: Tls | None, timeout: float) -> Node:
    return Node(OBSERVER, time.time_ns() // 1000, layout, Tcp("127.0.0.1:0", tls=tls, timeout=timeout))
