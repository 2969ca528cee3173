"""What a message is asked before anything is done with it: whether it is in the protocol, and who may ask for what."""

import reprlib
from collections.abc import Mapping
from typing import Any, TypeGuard

from crossover_jax.islands.layout import Layout
from crossover_jax.islands.roster import OBSERVER
from crossover_jax.islands.stream import Head

STATE, PARAMS = "state", "params"
OTHERS = 64  # names that are not in the roster, whose last errors are kept


def is_name(said: Any) -> TypeGuard[str]:
    """Whether this can be an island's name."""
    return isinstance(said, str) and len(said) < 64


def is_incarnation(said: Any) -> TypeGuard[int]:
    """Whether this can be the number of a life."""
    return isinstance(said, int) and 0 <= said < 1 << 62


def short(said: Any) -> str:
    """What another has said, of any type and length, for a sentence of ours.

    >>> short("a\\x1b[2J" + 1000 * "b")[:6]
    'a?[2Jb'
    """
    text = said[:300] if isinstance(said, str) else reprlib.repr(said)
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def hosts_in(head: Head) -> list[str]:
    """The addresses of an island's hosts, if it has said any."""
    said = head.get("hosts")
    return said if isinstance(said, list) and all(isinstance(address, str) for address in said) else []


def refusal(head: Head, certified: str | None, layout: Layout, incarnations: Mapping[str, int]) -> Head | None:
    """Why a request is refused, if it is. `certified` is the name in the asker's certificate."""
    name, incarnation, do = head.get("from"), head.get("incarnation"), head.get("do")
    if not is_name(name) or not is_incarnation(incarnation) or not isinstance(head.get("clock"), dict):
        return {"refused": "a message that is not in this protocol"}
    if do not in ("exchange", "outcome", "status", STATE, PARAMS):
        return {"refused": f"{short(do)} is nothing that can be asked for"}
    if certified not in (None, name):
        return {"refused": f"the certificate is that of {certified!r}, not of {short(name)!r}"}
    if name == OBSERVER and do not in ("status", PARAMS):
        return {"refused": f"{OBSERVER!r} may look, and nothing else"}
    if do != "status" and head.get("model") != layout.model:
        return {"refused": "another model: names, shapes or dtypes of its parameters differ"}
    # An id is its asker's: who could name another's could decide on an exchange between two others.
    id, life = head.get("id"), f"{name}@{incarnation}:"
    if do in ("exchange", "outcome") and not (isinstance(id, str) and id.startswith(life) and len(id) < 200):
        return {"refused": f"{short(id)} is no exchange of this asker"}
    return _refusal_of_exchange(head, layout, incarnations.get(name, 0)) if do == "exchange" else None


def _refusal_of_exchange(head: Head, layout: Layout, newest: int) -> Head | None:
    segment = head.get("segment")
    if head.get("fingerprint") != layout.fingerprint:
        return {"refused": "another cut, wire or version of the protocol: fingerprints differ"}
    if head["incarnation"] < newest:
        return {"refused": f"a newer process has the name {head['from']!r}", "superseded": newest}
    if not isinstance(segment, int) or not 0 <= segment < len(layout.segments):
        return {"refused": f"there is no segment {short(segment)}"}
    return None
