"""The command line of islands: one view of all of them, and their keys."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from crossover_jax.islands import keys
from crossover_jax.islands.clock import Clock
from crossover_jax.islands.heads import short
from crossover_jax.islands.observe import look
from crossover_jax.islands.roster import OBSERVER, Roster, directory, roster_of
from crossover_jax.islands.stream import Head
from crossover_jax.islands.transport import Tls
from crossover_jax.text import as_table

TIMEOUT = 5.0  # seconds that one island may take to answer
HEADER = ("island", "steps", "clock", "age", "participation", "delivered", "distance", "state from")


def add_commands(commands: Any) -> None:
    """`islands` and `islands keys`, for the subparsers of a command line."""
    command = commands.add_parser("islands", help="show all islands of a run", description=_ABOUT_VIEW)
    command.set_defaults(run=_run_view)
    command.add_argument("roster", metavar="ROSTER", help='a directory, dns:NAME:PORT, or "a=HOST:PORT,b=HOST:PORT"')
    command.add_argument("--keys", metavar="DIR", help=f"where ca.crt and the key of {OBSERVER!r} are")
    command.add_argument("--plain-text", action="store_true", help="the run is without TLS")
    command.add_argument("--json", action="store_true", help="print all that the islands say, as JSON")
    command.add_argument("--every", type=float, default=2.0, help="seconds between two looks (default: 2)")
    command = commands.add_parser("islands keys", help="make keys for islands", description=_ABOUT_KEYS)
    command.set_defaults(run=_run_keys)
    command.add_argument("directory", metavar="DIR", help="where the keys are, or will be")
    command.add_argument("names", metavar="NAME", nargs="+", help="of an island")
    command.add_argument("--days", type=float, default=90.0, help="that certificates hold (default: 90)")


_ABOUT_VIEW = """One view of all islands: live in a terminal, until Ctrl-C, and once elsewhere. The command
`islands keys DIR NAME [NAME ...]` makes their keys."""
_ABOUT_KEYS = """Make the run's certificate authority, unless DIR has it, and a key and a certificate for each name. An
island needs ca.crt, NAME.crt and NAME.key. Keep ca.key to yourself."""


def _run_keys(args: argparse.Namespace) -> str:
    made = keys.make_keys(args.directory, args.names, days=args.days)
    rows = [(name, f"ca.crt, {name}.crt, {name}.key", f"{ends:%Y-%m-%d}") for name, ends in made.items()]
    return as_table(("name", f"needs from {args.directory}", "until"), rows)


def _run_view(args: argparse.Namespace) -> str:
    if bool(args.keys) == args.plain_text:
        got = "both" if args.keys else "neither"
        raise ValueError(
            f"`islands` must have either `--keys DIR` or, where keys are not used, `--plain-text`, got {got}."
        )
    if not args.every > 0:
        raise ValueError(f"`--every` must be positive, got {args.every:g}.")
    roster, tls = roster_of(args.roster), Tls.of(args.keys, OBSERVER) if args.keys else None
    if isinstance(roster, directory) and not roster.path.is_dir():
        raise ValueError(f"ROSTER must be a directory, or else addresses, got {args.roster!r}, which is not there.")
    if sys.stdout.isatty() and not args.json:
        return _watch(lambda: as_text(overview(_look(roster, tls))), args.every)
    found = overview(_look(roster, tls))
    return json.dumps(found, indent=2) if args.json else as_text(found)


def _look(roster: Roster, tls: Tls | None) -> dict[str, Head]:
    try:
        return look(roster, tls=tls, timeout=TIMEOUT)
    except OSError as error:
        raise ValueError(f"the roster could not be read: {error}.") from error


def _watch(show: Callable[[], str], every: float) -> str:
    try:
        while True:
            try:
                text = show()
            except ValueError as error:
                text = str(error)
            width = shutil.get_terminal_size().columns
            print("\x1b[H\x1b[J" + "\n".join(line[:width] for line in text.splitlines()), flush=True)
            time.sleep(every)
    except KeyboardInterrupt:
        return ""


def overview(said: Mapping[str, Head]) -> dict[str, Any]:
    """What `look` has found, with what follows from it: examples delivered, in all and by island, and participation.

    `gone` has those of the clock that are not in the roster any more.

    >>> overview({"a": {"clock": {"a@1": 64.0, "b@1": 32.0}, "exchanged": 3, "due": 4}})["gone"]
    {'b': 32.0}
    """
    # What is not JSON, such as NaN, cannot be shown as JSON.
    said = json.loads(json.dumps(said), parse_constant=lambda _: None)
    clock, delivered = Clock(), dict.fromkeys(said, 0.0)
    for head in said.values():
        clock.merge(_parts(head.get("clock")))
    for life, count in clock.counts.items():
        name = life.rpartition("@")[0]
        delivered[name] = delivered.get(name, 0.0) + count
    for name, head in said.items():
        exchanged, due = (head.get(key) for key in ("exchanged", "due"))
        head["participation"] = None
        if _is_number(exchanged) and _is_number(due) and due > 0:
            head["participation"] = exchanged / due
        head["delivered"] = delivered[name]
    gone = {name: count for name, count in sorted(delivered.items()) if name not in said}
    return {"delivered": float(clock.total), "islands": said, "gone": gone}


def as_text(found: Mapping[str, Any]) -> str:
    """An `overview`, for people."""
    islands, gone = found["islands"], found["gone"]
    answer = {name: head for name, head in islands.items() if "error" not in head}
    title = f"{len(answer)} of {len(islands)} islands in the roster answer; delivered in all: {found['delivered']:,.0f}"
    rows = [(short(name), *_row(head)) for name, head in islands.items()]
    rows += [(short(name), *_row({"delivered": count, "origin": "not in the roster"})) for name, count in gone.items()]
    lines = [f"{name} does not answer: {head['error']}" for name, head in islands.items() if "error" in head]
    for name, head in answer.items():
        lines += [f"{name}, exchange with {peer}: {why}" for peer, why in _parts(head.get("errors")).items()]
        lines += [f"{name}, link to {peer}: {why}" for peer, why in _parts(head.get("impaired")).items()]
        lines += [f"{name} has refused {why}" for why in _parts(head.get("strangers")).values()]
    return "\n\n".join(
        [title, *([as_table(HEADER, rows)] if rows else []), *(["\n".join(map(short, lines))] if lines else [])]
    )


def _row(head: Head) -> tuple[str, ...]:
    """What comes from others may be of any type."""
    numbers = [("steps", ",.0f"), ("total", ",.0f"), ("age", ".1f"), ("participation", ".0%"), ("delivered", ",.0f")]
    shown = [f"{head.get(key):{form}}" if _is_number(head.get(key)) else "-" for key, form in numbers]
    shown[2] += " s" if shown[2] != "-" else ""
    distance = f"{head['distance']:.3g}" if _is_number(head.get("distance")) else "-"
    return *shown, distance, short(head.get("origin") or "-")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < 1e18


def _parts(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
