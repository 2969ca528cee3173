"""What an island begins with: a peer's state, its own checkpoint, or the run's seed."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

from crossover_jax.islands.node import STATE, Node
from crossover_jax.islands.state import check_state, has_nan, longest_of
from crossover_jax.islands.stream import Head, LinkError
from crossover_jax.leaves import PyTree

CHECKPOINT = "a checkpoint"
_NO_STATE = (
    "island {name!r} found nothing to begin with in {patience:g} s: it does not found the run, no peer that has met "
    "another is there (in the roster: {who}), and no checkpoint was given. Give `join` a checkpoint and its clock, "
    "start the island that founded the run, or begin a new run, in an empty directory or by `found=True` on one island."
)


class NoState(RuntimeError):
    """There is nothing to begin with: no peer, no checkpoint, and the run has begun already."""


async def first_state(
    node: Node,
    state: PyTree,
    is_restored: bool,
    look_around: Callable[[], Awaitable[None]],
    founds: Callable[[], Awaitable[bool]],
    blocking: Callable[..., Awaitable[Any]],
) -> bytes | bytearray:
    """A peer's state in bytes, or none where the own one is what to begin with.

    From a peer that has met others, the own checkpoint, a peer's checkpoint, or the seed: in this order. `founds` says
    whether this island begins the run; `blocking` calls a function while others are answered. Raises `NoState`, and
    `ValueError` for a peer's state of other shapes.
    """
    loop, longest = asyncio.get_running_loop(), longest_of(state)
    until, life = loop.time() + node.patience, f"{node.name}@{node.incarnation}"
    bad: set[str] = set()  # whose state has a NaN in it
    while True:
        await look_around()
        said = {peer: head for peer, head in (await _ask_all(node)).items() if peer not in bad}
        for is_donor in (True, False):
            peers = [peer for peer, head in said.items() if bool(head.get("donor")) == is_donor]
            for peer in random.Random(life).sample(peers, len(peers)):
                is_last_resort = not is_donor and not is_restored and loop.time() > until
                if is_donor or (is_last_resort and said[peer].get("origin") == CHECKPOINT):
                    with contextlib.suppress(LinkError):
                        head, body = await node.fetch(peer, STATE, longest)
                        check_state(head, state, peer)
                        if not await blocking(has_nan, body, state):
                            node.origin = f"{peer}, at its step {head.get('steps')}"
                            return body
                        bad.add(peer)
                        node.links.keep_error(
                            f"the state of {peer}", "it has a NaN in it, and was not taken", "refused"
                        )
        if is_restored:
            node.origin = CHECKPOINT
            return b""
        if await founds():
            node.is_founder, node.origin = True, "the run's seed"
            return b""
        if any(head.get("donor") for head in said.values()):  # it is there, perhaps in its first compilation
            until = loop.time() + node.patience
        if loop.time() > until:
            raise NoState(_NO_STATE.format(name=node.name, patience=node.patience, who=sorted(said) or "nobody"))
        await asyncio.sleep(min(1.0, node.patience / 10))


async def _ask_all(node: Node) -> dict[str, Head]:
    """What each of the others says of itself, if it says anything."""
    found: dict[str, Head] = {}

    async def ask(peer: str) -> None:
        with contextlib.suppress(LinkError):
            found[peer] = await node.status(peer)

    await asyncio.gather(*map(ask, list(node.links.members)))
    return found
