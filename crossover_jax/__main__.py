"""What a topology and links promise, before anything is trained, and how the islands of a run are.

`python -m crossover_jax describe NAME --workers N`: what a topology promises.
`python -m crossover_jax plan --params M --workers N --compute-ms T --dcn-gbps B`: what to take on such links.
`python -m crossover_jax doctor`: what exchanges are and take on these devices.
`python -m crossover_jax islands ROSTER`: the islands of a run; `islands keys DIR NAME`: their keys.
"""

import argparse
import difflib
import inspect
import json
import pathlib
import sys
from collections.abc import Callable

import jax

from crossover_jax import doctor, plan, topology
from crossover_jax.islands import view
from crossover_jax.mesh import make_mesh
from crossover_jax.text import as_table
from crossover_jax.topology.describe import as_text, describe, draw

PLANNED = (topology.base, topology.complete, topology.exponential, topology.hypercube, topology.ring)
DRAWN = (topology.balanced, topology.derangements, topology.latin, topology.pull, topology.symmetric)
TOPOLOGIES: dict[str, Callable[..., topology.Pool]] = dict(sorted((make.__name__, make) for make in PLANNED + DRAWN))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 2 for a request that cannot be met, with one sentence on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:2] == ["islands", "keys"]:  # else `keys` would be a roster
        argv[:2] = ["islands keys"]
    args = _parser().parse_args(argv)
    try:
        print(args.run(args))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m crossover_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("describe", help="print what a topology promises")
    command.set_defaults(run=_run_describe)
    command.add_argument("name", metavar="NAME", help=", ".join(TOPOLOGIES))
    command.add_argument("--workers", type=int, required=True, help="how many copies of the model gossip")
    command.add_argument("--pool-size", type=int, help="rounds of a drawn pool (default: as many as in training)")
    command.add_argument("--peers", type=int, help="peers per round of exponential and base (default: 1)")
    command.add_argument("--hosts", type=int, default=1, help="equal hosts, to count the messages that leave them")
    command.add_argument("--slices", type=int, default=1, help="equal slices, likewise, and for symmetric")
    command.add_argument("--seed", type=int, help="of a drawn pool (default: 0)")
    command.add_argument("--plot", metavar="FILE", help="draw it too, as PNG or SVG; needs matplotlib")
    command.add_argument("--json", action="store_true", help="print the same as JSON")
    command = commands.add_parser("plan", help="print what a step takes, by every algorithm")
    command.set_defaults(run=_run_plan)
    command.add_argument("--params", type=float, required=True, help="parameters of the model")
    command.add_argument("--workers", type=int, required=True, help="how many copies of the model gossip")
    command.add_argument("--compute-ms", type=float, required=True, help="of a step without communication")
    command.add_argument("--dcn-gbps", type=float, required=True, help="rate of a worker's link to the others")
    command.add_argument("--dcn-us", type=float, default=50.0, help="latency of that link (default: 50)")
    command.add_argument("--every", type=int, nargs="+", default=[], help="outer steps too, after each so many steps")
    command.add_argument("--tokens", type=float, help="of a worker and step: bytes are shown per token too")
    command.add_argument("--chips", type=int, default=1, help="chips of a worker, which average gradients (default: 1)")
    command.add_argument("--ici-gbps", type=float, help="rate of a chip's link to the others of its worker")
    command.add_argument("--ici-us", type=float, default=1.0, help="latency of that link (default: 1)")
    command = commands.add_parser("doctor", help="try exchanges on these devices, in two minutes")
    command.set_defaults(run=_run_doctor)
    command.add_argument("--workers", type=int, help="how many (default: one for each device)")
    command.add_argument("--megabytes", type=float, default=32.0, help="of the larger message (default: 32)")
    command.add_argument("--devices", type=int, help="virtual CPU devices of this process")
    command.add_argument("--coordinator", metavar="HOST:PORT", help="where the first of several processes listens")
    command.add_argument("--processes", type=int, help="how many of them")
    command.add_argument("--process", type=int, help="which of them this one is")
    command.add_argument("--distributed", action="store_true", help="let JAX find the other processes, as on a pod")
    command.add_argument("--out", metavar="FILE", help="all that was found as JSON, to send")
    view.add_commands(commands)
    return parser


def _run_describe(args: argparse.Namespace) -> str:
    pool = _pool(args)
    report = describe(pool, hosts=args.hosts, slices=args.slices)
    if args.plot:
        draw(args.name, pool, args.hosts, args.slices).savefig(args.plot)
    return json.dumps({"name": args.name} | report, indent=2) if args.json else as_text(args.name, report)


def _run_plan(args: argparse.Namespace) -> str:
    for name in ("params", "workers", "dcn_gbps", "chips", *(["tokens"] if args.tokens is not None else [])):
        _require(name, getattr(args, name), getattr(args, name) > 0, "be positive")
    for name in ("compute_ms", "dcn_us", "ici_us"):
        _require(name, getattr(args, name), getattr(args, name) >= 0, "not be negative")
    inside = 0.0
    if args.chips > 1:
        _require("ici_gbps", args.ici_gbps, (args.ici_gbps or 0) > 0, f"be positive for {args.chips} chips")
        ici = plan.Link(1e9 * args.ici_gbps / 8, 1e-6 * args.ici_us)
        inside = plan.allreduce_seconds(4 * args.params, args.chips, ici)
    link = plan.Link(1e9 * args.dcn_gbps / 8, 1e-6 * args.dcn_us)
    given = args.params, args.workers, 1e-3 * args.compute_ms, link, inside
    text = _text_of_plan(*given, args.tokens)
    if not args.every:
        return text
    outer = _table_of_ways(plan.outer_ways(*given, args.every), args.tokens)
    return f"{text}\n\nLess often, per step; what it costs in accuracy is another question:\n\n{outer}"


def _run_doctor(args: argparse.Namespace) -> str:
    _require("megabytes", args.megabytes, args.megabytes > 0, "be positive")
    if args.devices is not None:
        jax.config.update("jax_num_cpu_devices", args.devices)
    if args.coordinator or args.distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPU devices; others have their own
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    workers = jax.device_count() if args.workers is None else args.workers
    inner = {"device": jax.device_count() // workers} if 0 < workers < jax.device_count() else None
    report = doctor.examine(make_mesh(workers, inner), megabytes=args.megabytes)
    if jax.process_index():
        return f"process {jax.process_index()} is done; the first one tells."
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(report, indent=1))
    return doctor.as_text(report)


def _require(name: str, value: float | int | None, holds: bool, requirement: str) -> None:
    if not holds:
        got = "nothing" if value is None else f"{value:g}"
        raise ValueError(f"`--{name.replace('_', '-')}` must {requirement}, got {got}.")


def _table_of_ways(found: list[plan.Way], tokens: float | None) -> str:
    rows = [
        (way.name, way.wire, f"{way.sent / 1e6:.4g} MB", _time(way.transfer), _time(way.step))
        + ((f"{way.sent / tokens:.4g} B",) if tokens else ())
        for way in found
    ]
    return as_table(("algorithm", "wire", "sent", "exchange", "step", *(["per token"] if tokens else [])), rows)


def _text_of_plan(
    params: float, workers: int, compute: float, link: plan.Link, inside: float, tokens: float | None
) -> str:
    found = plan.ways(params, workers, compute, link, inside)
    title = f"{workers} workers, {params / 1e6:g} million parameters, {1e3 * compute:g} ms of compute, links of {link}"
    title += f", {1e3 * inside:.3g} ms inside a worker" if inside else ""
    groups = plan.groups(params, workers, compute, link, inside)
    fewer = [(own.gossiping, own.members, _time(own.averaging), _time(own.step)) for own in groups]
    return f"""{title}

{_advice(params, workers, compute, link, inside)}{_table_of_ways(found, tokens)}

Crossover, during, saves 5 % of the step of AllReduce beside the backward pass, both in float32, \
{_rates(plan.where_it_pays(params, workers, compute, link, inside))}.

The same workers in groups whose members average gradients over the same links (float32, during):

{as_table(("gossiping", "members", "averaging", "step"), fewer)}"""


def _advice(params: float, workers: int, compute: float, link: plan.Link, inside: float) -> str:
    if not compute:  # nothing to hide an exchange behind
        return ""
    advice = plan.recommend(params, workers, compute, link, inside)
    members = f", each of {advice.members} that average gradients" if 1 < advice.gossiping < workers else ""
    return f"Take  {advice.take}{members}: {_time(advice.step)} a step.\n{advice.reason}\n\n"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms" if seconds < 10 else f"{seconds:.4g} s"


def _rates(pays: tuple[float, float] | None) -> str:
    if pays is None:
        return "at no rate"
    low, high = (None if rate in plan.RATES[[0, -1]] else f"{8 * rate / 1e9:.3g} Gbit/s" for rate in pays)
    if low and high:
        return f"on links from {low} to {high}"
    return f"on links above {low}" if low else f"on links below {high}" if high else "at every rate"


def _pool(args: argparse.Namespace) -> topology.Pool:
    if args.name not in TOPOLOGIES:
        near = difflib.get_close_matches(args.name, TOPOLOGIES, n=1, cutoff=0.4)
        advice = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TOPOLOGIES)}."
        raise ValueError(f"{args.name!r} is not a topology; {advice}")
    takes = inspect.signature(TOPOLOGIES[args.name]).parameters
    given = {name: getattr(args, name) for name in ("peers", "seed", "pool_size") if getattr(args, name) is not None}
    for name, value in given.items():
        if name not in takes:
            raise ValueError(f"{args.name!r} takes no `--{name.replace('_', '-')}`, got {value}.")
    options = {"pool_size": topology.advised_pool_size(args.workers), "slices": args.slices} | given
    return TOPOLOGIES[args.name](args.workers, **{name: value for name, value in options.items() if name in takes})


if __name__ == "__main__":
    sys.exit(main())
