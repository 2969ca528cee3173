"""A storm of faults over islands on this machine: what it does to the others, and how its victims come back.

    python -m experiments.islands.storm --workdir=runs/storm                           # every fault, about 8 minutes
    python -m experiments.islands.storm --workdir=runs/few --faults killed:saving,slow,late
    python -m experiments.islands.storm --workdir=runs/lm --config=experiments/configs/lm.py -- --config.seed=1
    python -m experiments.islands.storm --workdir=runs/waits --nobody-waits            # does anybody wait for a victim?

Islands train a small model while a seeded schedule of faults happens to one victim at a time. Each step has a timed
wait that stands for an accelerator, for the islands share this machine's cores: of two cores the steps of four islands
need a few milliseconds, but a process that starts takes seconds of both, and the others' steps show it.

Who is killed or stopped is hit in a window of its own, once in each: idle, half of a segment sent, half received,
between two segments, while a checkpoint is written, in the first exchange of a life. The signal comes from the victim
itself, which has hooks for that (hooks.py); one that does not come into its window within 15 s is hit from outside.
Other faults come at any time. Faults of links need Linux' root, and are left out elsewhere: each island then has a
network namespace, its link is taken down, halved, made to lose 1 % of its packets, or all links between two halves of
the islands carry nothing. The roster is a directory, and is not cut.

    --workdir/events.csv   a line for each event, see measures.py
    --workdir/means.csv    the mean of all islands on held-out data, over time
    --workdir/storm.png    islands over time, steps, loss

The model is a perceptron on Fashion-MNIST if `--data-dir` has it, else the small language model. `--config` names
another config, and what follows `--` goes to all islands. The exit code is 1 if an island other than a victim has
ended, or a victim has not come back.
"""

import argparse
import contextlib
import itertools
import math
import pathlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from crossover_jax.text import as_table
from experiments import csv_rows, data, flags, processes
from experiments.islands import faults, links, nobody_waits
from experiments.islands.faults import Event, Hitter, Planned
from experiments.islands.fleet import Fleet, Life, NotBegun, environment
from experiments.islands.measures import machine, participation, returns, row_of, track
from experiments.islands.picture import draw
from experiments.islands.program import IslandProgram, make_island_program
from experiments.islands.watcher import Watcher, watching
from experiments.launch import local
from experiments.paths import local_path

PERCEPTRON = (
    "--config.model.name=mlp",
    "--config.model.options={'hidden': (128,)}",
    "--config.schedule.learning_rate=0.05",
    "--config.dataset.eval_split=test[:2000]",
)
SHOWN = (
    *("event", "fault", "window", "victims", "step_p50_ms", "step_p95_ms", "step_p99_ms", "calm_p50_ms"),
    *("calm_p95_ms", "calm_p99_ms", "next_exchange_s", "back_to_step_s", "back_to_exchange_s", "participation"),
    *("clock", "named_s"),
)


def main(argv: Sequence[str]) -> int:
    """Run a storm, or the measurement of who waits; the exit code."""
    args = parse(argv)
    if args.network == "yes" and (reason := links.why_not()):
        sys.exit(f"error: `--network` must be no on this machine: {reason}")
    if args.network == "yes":
        links.hosts.enter()
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, through every `finally`
    try:
        args.folder.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"error: `--workdir` must be a new folder, got {args.folder}, which is there.")
    try:
        if args.nobody_waits:
            return nobody_waits.measure(args.folder, config_flags(args), args.pace_ms or 60.0, args.steps)
        return storm(args)
    except NotBegun as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """This program's own flags, and `island_flags`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a new folder for all that islands and storm write")
    parser.add_argument("--islands", type=int, default=4, help="at the start; each `late` is one more")
    parser.add_argument("--pace_ms", type=float, help="a step takes at least so long; default 100, for nobody-waits 60")
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults, and of their victims")
    parser.add_argument("--faults", help=f"default: all. fault or fault:window,...: {', '.join(faults.FAULTS)}")
    parser.add_argument("--calm", type=float, default=6.0, help="seconds between two events, behind all returns")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds without progress that a link has")
    parser.add_argument("--network", choices=("yes", "no"), help="faults of links; default: where they are possible")
    parser.add_argument("--rate", default="50mbit", help="of each link, as tc writes it")
    parser.add_argument("--config", help="default: a perceptron on Fashion-MNIST, or lm.py")
    parser.add_argument("--data-dir", default="data", help="where Fashion-MNIST is")
    parser.add_argument("--nobody-waits", action="store_true", help="measure whether anybody waits for a victim")
    parser.add_argument("--steps", type=int, default=2200, help="of an island that nothing happens to (--nobody-waits)")
    parser.add_argument("island_flags", nargs="*", metavar="-- island.py's flags")
    args = parser.parse_args(argv)
    if args.islands < 2:
        parser.error("--islands must be at least 2")
    try:
        args.folder = pathlib.Path(local_path("--workdir", args.workdir)).absolute()
        args.planned = [Planned.of(text) for text in args.faults.split(",")] if args.faults else None
    except ValueError as error:
        parser.error(str(error))
    of_links = args.planned is None or any(fault.fault in faults.OF_LINKS for fault in args.planned)
    if args.network is None:
        args.network = "yes" if of_links and not args.nobody_waits and not links.why_not() else "no"
    if args.planned is None:
        args.planned = faults.schedule(args.seed, args.network == "yes")
    elif of_links and args.network == "no":
        parser.error(f"--faults must be without {', '.join(faults.OF_LINKS)} here: {links.why_not() or '--network=no'}")
    return args


def config_flags(args: argparse.Namespace) -> list[str]:
    """Which model is trained on what."""
    if args.config:
        return [f"--config={args.config}", *args.island_flags]
    place = f"--config.dataset.data_dir={pathlib.Path(args.data_dir).absolute()}"
    try:
        data.load("fashion_mnist", "test[:1]", data_dir=args.data_dir)
    except data.DataMissing:
        lm = pathlib.Path(__file__).parents[1] / "configs/lm.py"
        return [f"--config={lm}", "--config.dataset.eval_split=validation[:5%]", *args.island_flags]
    return [f"--config={flags.DEFAULT_CONFIG}", place, *PERCEPTRON, *args.island_flags]


# The storm


def storm(args: argparse.Namespace) -> int:
    """Start islands, have it happen, and report; the exit code."""
    late = sum(planned.fault == faults.LATE for planned in args.planned)
    names = list(itertools.islice(local.island_names(), args.islands + late))
    first = names[: args.islands]
    pace_ms = args.pace_ms or 100.0
    seconds = 40 + sum(25 + args.calm for _ in args.planned)  # as far as can be said beforehand
    config, *more = config_flags(args)
    own = [
        config,
        f"--pace_ms={pace_ms}",
        f"--timeout={args.timeout}",
        f"--config.steps={math.ceil(1.5 * seconds / (pace_ms / 1e3))}",  # the run must not end before the storm
        "--config.log_every=50",
        "--config.checkpoint.every=50",
        *more,
    ]
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(links.linked(names, args.rate)) if args.network == "yes" else None
        where: dict[str, Any] = {"inside": lab.inside, "address": lab.address} if lab else {}
        fleet = Fleet(args.folder, own, environment(args.folder), islands=args.islands, **where)
        stack.callback(fleet.close)
        made = program([*own, f"--config.num_workers={args.islands}"])
        for name in first:
            fleet.start(name)
        with watching(str(fleet.folder / "roster"), made, args.folder / "views.jsonl") as watcher:
            fleet.wait_until(lambda: all(len(track(fleet, name).exchanges) for name in first), first)
            ready = time.time()
            print(f"all {len(first)} islands exchange after {ready - fleet.lives[0].began:.1f} s", flush=True)
            events = happen(args, fleet, Hitter(fleet, lab, names[args.islands :], pace_ms, args.seed))
        watcher.look()
        watcher.evaluate()
        ended = time.time()
        codes = fleet.end()
    return report(args, fleet, events, watcher, ready, ended, codes)


def program(island_flags: Sequence[str]) -> IslandProgram:
    """What the islands train, to evaluate it here. A config that cannot be loaded ends this process with one line."""
    before, sys.argv = sys.argv, ["island.py", *island_flags]  # where ml_collections looks for keys of the config
    try:
        flags.parse_flags(sys.argv)  # absl knows the island's own since hooks.py has imported `experiments.island`
    finally:
        sys.argv = before
    return make_island_program(flags.CONFIG.value)


def happen(args: argparse.Namespace, fleet: Fleet, hitter: Hitter) -> list[Event]:
    """One event after the other, each when the victims of the one before are back and it was calm for a while."""
    time.sleep(faults.STOP_S)  # calm, to compare with
    for name in fleet.alive():
        fleet.keep(name)  # the old checkpoint of who comes back with one
    events: list[Event] = []
    for planned in args.planned:
        event = hitter.bring(planned)
        events.append(event)
        until = time.time() + faults.PATIENCE_S
        time.sleep(max(0.0, event.at + faults.STOP_S - time.time()))
        while time.time() < until and not is_back(fleet, event):
            time.sleep(0.2)
        victims = ", ".join(event.victims)
        step, exchange = returns(event, {name: track(fleet, name) for name in event.victims})
        back = "" if math.isnan(step) else f"; back at its first step after {step:.1f} s, exchange {exchange:.1f} s"
        print(f"{len(events):3} of {len(args.planned)}: {event.fault}, {event.window}: {victims}{back}", flush=True)
        time.sleep(args.calm)
    return events


def is_back(fleet: Fleet, event: Event) -> bool:
    return all(
        not math.isinf(seconds) for seconds in returns(event, {name: track(fleet, name) for name in event.victims})
    )


# What is shown and kept


def report(
    args: argparse.Namespace,
    fleet: Fleet,
    events: Sequence[Event],
    watcher: Watcher,
    ready: float,
    ended: float,
    codes: Mapping[str, int | None],
) -> int:
    """Write and print it all; the exit code."""
    tracks = {name: track(fleet, name) for name in fleet.names()}
    rows = [row_of(i, event, events, tracks, watcher.views, ready) for i, event in enumerate(events, 1)]
    csv_rows.append(args.folder / "events.csv", [{k: _text(v) for k, v in row.items()} for row in rows], list(rows[0]))
    means = [{**mean, "at": mean["at"] - ready} for mean in watcher.means]
    csv_rows.append(args.folder / "means.csv", means, list(means[0]))
    title = f"{args.islands} islands, {len(events)} faults, seed {args.seed}"
    draw(args.folder / "storm.png", events, tracks, watcher.means, fleet.lives[0].began, ended, title)
    print()
    print(as_table(SHOWN, [[_text(row[name]) for name in SHOWN] for row in rows]))
    print()
    for row in rows:
        print(f"{row['event']:3} {row['fault']}: {row['named']}")
    alone = by_themselves(fleet, events, ended)
    lost = [row for row in rows if math.isinf(row["back_to_step_s"]) or math.isinf(row["back_to_exchange_s"])]
    mean, (_, last) = watcher.means[-1], watcher.views[-1]
    nothing = {name: {"due": 0, "exchanged": 0} for name in last}
    share = participation([(0.0, nothing), (1.0, last)], list(last), 0.0, 1.0)
    print(
        f"\nmean of all islands, at {mean['clock']:.0f} examples: loss {mean['loss']:.4f}, "
        f"accuracy {mean['accuracy']:.4f}"
        f"\nparticipation of the last lives: {share:.2f}"
        f"\nended without being hit: {', '.join(f'{life.name} with {life.code}' for life in alone) or 'none'}"
        f"\ndid not come back: {', '.join(row['victims'] for row in lost) or 'none'}"
        f"\nnot named within 10 s: {', '.join(row['fault'] for row in rows if row['named'] == 'no') or 'none'}"
        f"\nSIGTERM ended them with: {' '.join(sorted({str(code) for code in codes.values()}))}"
        f"\n{machine()}"
    )
    return int(bool(alone or lost or set(codes.values()) != {processes.PREEMPTED}))


def by_themselves(fleet: Fleet, events: Sequence[Event], ended: float) -> list[Life]:
    """Lives that ended though nobody had hit them; all end by SIGTERM at the end."""

    def is_hit(life: Life) -> bool:
        # Before the first exchange of a life comes the end of the life before.
        when = [(event.at - faults.PATIENCE_S, event.until + 1) for event in events if life.name in event.victims]
        return life.code == -signal.SIGKILL and any(first <= (life.ended or 0.0) <= last for first, last in when)

    return [life for life in fleet.lives if life.ended is not None and life.ended < ended and not is_hit(life)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
