"""Who may be there: a shared directory, a list, or a DNS name. Whether somebody is there is learnt by asking."""

import json
import os
import pathlib
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from crossover_jax.islands.transport import split_address

OBSERVER = "observer"  # who looks from outside, and is no island


class Superseded(RuntimeError):
    """A newer process has this island's name: this one must end."""


@runtime_checkable
class Roster(Protocol):
    """Islands that may be there. All calls may block; `Island` makes them outside of the training loop."""

    def members(self) -> dict[str, str]:
        """Addresses by name. Where names are not known beforehand, the address stands for the name."""

    def announce(self, name: str, address: str, incarnation: int) -> None:
        """Say that this island is there; called again and again. Raises `Superseded`."""

    def incarnation(self, name: str) -> int:
        """The newest life of this island that was announced; 0 if none is known."""

    def withdraw(self, name: str, incarnation: int) -> None:
        """Say that this life of the island has left."""

    def may_found(self, name: str) -> bool:
        """Whether this island is the one that begins the run, from the run's seed."""

    def begun(self) -> None:
        """Say that the run has delivered something: from now on nobody begins it from the seed."""


class _Given:
    """A roster that others keep: there is nothing to write, and nobody founds a run by himself."""

    def announce(self, name: str, address: str, incarnation: int) -> None:
        pass

    def incarnation(self, name: str) -> int:
        return 0

    def withdraw(self, name: str, incarnation: int) -> None:
        pass

    def may_found(self, name: str) -> bool:
        return False

    def begun(self) -> None:
        pass


class static(_Given):
    """A fixed list of addresses by name, as from Slurm's host list.

    Nobody founds a run by itself there: `Island.join(state, found=True)` on one island, on the first day.

    >>> static({"a": "10.0.0.1:7000", "b": "10.0.0.2:7000"}).members()["b"]
    '10.0.0.2:7000'
    """

    def __init__(self, members: Mapping[str, str]):
        for name, address in members.items():
            check_name(name)
            split_address(address)
        self._members = dict(members)

    def members(self) -> dict[str, str]:
        return dict(self._members)


class dns(_Given):
    """All addresses of a DNS name, "trainers.default.svc:7000": a headless service of Kubernetes.

    An island's name is then what its certificate, or in plain text its answer, says. Founding is as with `static`.
    """

    def __init__(self, address: str):
        self.host, self.port = split_address(address)

    def members(self) -> dict[str, str]:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        hosts = sorted({str(address[0]) for *_, address in found})
        addresses = [f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}" for host in hosts]
        return {address: address for address in addresses}


class directory:
    """A directory that all islands can write: one file for each, and one that says who founded the run.

    An island whose file has not changed for `patience` seconds, by the reader's own clock, has gone: clocks and
    modification times of file systems are not compared. If the directory is away, islands go on with whom they know.
    The path may be any object with the methods of `pathlib.Path`, such as etils' `epath.Path` for a bucket. A bucket
    cannot create a file exclusively: founding is as with `static` there.

    The first island to create the file of the run's founder begins it. Should that one be started again before it has
    delivered anything, it begins again; later nobody does, and who finds neither peer nor checkpoint is refused.
    """

    def __init__(self, path: Any, *, patience: float = 30.0, now: Callable[[], float] = time.monotonic):
        self.path = pathlib.Path(path) if isinstance(path, str) else path
        self.patience, self._now = patience, now
        self._beat = 0
        self._seen: dict[str, tuple[Any, float]] = {}  # what a file said last, and since when

    def members(self) -> dict[str, str]:
        now, found = self._now(), {}
        for path in sorted(self.path.glob("*.island")):
            said = _read(path)
            name = path.name.removesuffix(".island")
            if said is None or not isinstance(said.get("address"), str):
                continue  # half written, or just removed
            if self._seen.get(name, (None, 0.0))[0] != said:
                self._seen[name] = said, now
            if now - self._seen[name][1] <= self.patience:
                found[name] = said["address"]
        return found

    def announce(self, name: str, address: str, incarnation: int) -> None:
        check_name(name)
        self.path.mkdir(parents=True, exist_ok=True)
        if self.incarnation(name) > incarnation:
            raise Superseded(f"a newer process has the name {name!r} in {self.path}: this one must end.")
        self._beat += 1
        _write(self.path / f"{name}.island", {"address": address, "incarnation": incarnation, "beat": self._beat})

    def incarnation(self, name: str) -> int:
        found = (_read(self.path / f"{name}.island") or {}).get("incarnation")
        return found if isinstance(found, int) else 0

    def withdraw(self, name: str, incarnation: int) -> None:
        if self.incarnation(name) == incarnation:
            (self.path / f"{name}.island").unlink(missing_ok=True)

    def may_found(self, name: str) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with (self.path / "founder").open("x") as file:
                file.write(name)
            return True
        except FileExistsError:
            begun = (self.path / "begun").exists()
            return not begun and (self.path / "founder").read_text() == name
        except ValueError:  # etils' paths do not know this mode
            return False

    def begun(self) -> None:
        path = self.path / "begun"
        if not path.exists():
            path.write_text("")


def check_name(name: str) -> None:
    """Raise `ValueError` for a name that no certificate can bear."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise ValueError(
            f"an island's name must be 1 to 63 lower-case letters, digits and inner hyphens, as in a host name, got "
            f"{name!r}."
        )
    if name == OBSERVER:
        raise ValueError(f"an island's name must not be {name!r}, which is who looks from outside: choose another.")


def _read(path: Any) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _write(path: Any, said: dict[str, Any]) -> None:
    own = path.with_name(f".{path.name}.{os.getpid()}")
    own.write_text(json.dumps(said))
    own.replace(path)


def roster_of(text: str) -> Roster:
    """The roster that a command line names: a directory, "dns:NAME:PORT", or "a=HOST:PORT,b=HOST:PORT"."""
    if text.startswith("dns:"):
        return dns(text.removeprefix("dns:"))
    if "=" in text:
        pairs = [pair.partition("=") for pair in text.split(",")]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(f'a roster of addresses must be "a=HOST:PORT,b=HOST:PORT", got {text!r}.')
        return static({name: address for name, _, address in pairs})
    return directory(text)
