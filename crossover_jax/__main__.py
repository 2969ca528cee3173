"""What can be said before anything is trained.

`python -m crossover_jax describe NAME --workers N`: what a topology promises.
`python -m crossover_jax plan --params M --workers N --compute-ms T --dcn-gbps B`: which algorithm pays on such links.
"""

import argparse
import difflib
import inspect
import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from crossover_jax import plan, topology

TOPOLOGIES: dict[str, Callable[..., topology.Pool]] = {
    "balanced": topology.balanced,
    "base": topology.base,
    "complete": topology.complete,
    "derangements": topology.derangements,
    "exponential": topology.exponential,
    "hypercube": topology.hypercube,
    "latin": topology.latin,
    "pull": topology.pull,
    "ring": topology.ring,
    "symmetric": topology.symmetric,
}
ORDERS = ("at random", "in turn")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 2 for a request that cannot be met, with one sentence on stderr."""
    args = _parser().parse_args(argv)
    try:
        print(args.run(args))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def describe(pool: topology.Pool, *, hosts: int = 1, slices: int = 1) -> dict[str, Any]:
    """What `pool` promises, as plain data: its mixing, and the messages that leave workers, hosts and slices.

    "at random" draws every round uniformly from the pool (`shuffle`, `sample`), "in turn" takes them in order
    (`rotate`, `cycle`). Rounds to a tenth are for the worst disagreement: in turn measured, at random the number after
    which its mean square is at most a hundredth; None: more than were tried. Messages are even when in every round all
    workers (hosts, slices) send equally many.

    >>> describe(topology.exponential(8))["exact_after"]
    3
    """
    worst, mean = topology.contraction(pool)
    peers = _peers_heard(pool)
    left = topology.decay(pool, range(pool.num_rounds))
    return {
        "workers": pool.num_workers,
        "rounds": pool.num_rounds,
        "peers": peers,
        "keeps_agreement": pool.keeps_agreement,
        "keeps_mass": pool.keeps_mass,
        "contraction": {
            "worst": worst,
            "mean": mean,
            "ideal": topology.ideal_contraction(pool.num_workers, peers),
        },
        "rounds_to_a_tenth": {"at random": _rounds_at_random(worst), "in turn": _rounds_in_turn(pool)},
        "effective_neighbors": {
            f"gamma {gamma}": {
                order: topology.effective_neighbors(pool, gamma, in_turn=order == "in turn") for order in ORDERS
            }
            for gamma in (0.9, 0.99)
        },
        "exact_after": next((t for t, share in enumerate(left, start=1) if share < 1e-12), None),
        "messages": {
            sender: {"min": int(sent.min()), "max": int(sent.max()), "even": bool((sent == sent[:, :1]).all())}
            for sender, sent in topology.messages(pool, hosts, slices)._asdict().items()
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m crossover_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("describe", help="print what a topology promises")
    command.set_defaults(run=_run_describe)
    command.add_argument("name", metavar="NAME", help=", ".join(TOPOLOGIES))
    command.add_argument("--workers", type=int, required=True, help="how many copies of the model gossip")
    command.add_argument(
        "--pool-size",
        type=int,
        help="rounds of a drawn pool (default: as in training, about 2 log2 of the workers, at least 8)",
    )
    command.add_argument("--peers", type=int, help="peers per round of exponential and base (default: 1)")
    command.add_argument("--hosts", type=int, default=1, help="equal hosts, to count the messages that leave them")
    command.add_argument("--slices", type=int, default=1, help="equal slices, likewise, and for symmetric")
    command.add_argument("--seed", type=int, help="of a drawn pool (default: 0)")
    command.add_argument("--json", action="store_true", help="print the same as JSON")
    command = commands.add_parser("plan", help="print what a step takes, by every algorithm")
    command.set_defaults(run=_run_plan)
    command.add_argument("--params", type=float, help="parameters of the model")
    command.add_argument("--workers", type=int, help="how many copies of the model gossip")
    command.add_argument("--compute-ms", type=float, help="of a step without communication")
    command.add_argument("--dcn-gbps", type=float, help="rate of a worker's link to the others")
    command.add_argument("--dcn-us", type=float, default=50.0, help="latency of that link (default: 50)")
    command.add_argument("--chips", type=int, default=1, help="chips of a worker, which average gradients (default: 1)")
    command.add_argument("--ici-gbps", type=float, help="rate of a chip's link to the others of its worker")
    command.add_argument("--ici-us", type=float, default=1.0, help="latency of that link (default: 1)")
    command.add_argument("--fit", metavar="CSV", help="latency and rate from measurements of benchmarks/scaling.py")
    command.add_argument("--check", metavar="CSV", help="compare what --fit says with these measurements instead")
    return parser


def _run_describe(args: argparse.Namespace) -> str:
    report = {"name": args.name} | describe(_pool(args), hosts=args.hosts, slices=args.slices)
    return json.dumps(report, indent=2) if args.json else _text(report)


def _run_plan(args: argparse.Namespace) -> str:
    if args.fit:
        rows = plan.read(args.fit)
        return _text_of_fit(plan.fit(rows), plan.read(args.check) if args.check else rows)
    needed = {"--params": args.params, "--workers": args.workers, "--compute-ms": args.compute_ms}
    needed |= {"--dcn-gbps": args.dcn_gbps, "--ici-gbps": args.ici_gbps if args.chips > 1 else 1.0}
    if lacking := [name for name, value in needed.items() if value is None]:
        raise ValueError(f"{', '.join(lacking)} must be given.")
    for name, value in (needed | {"--chips": args.chips, "--dcn-us": args.dcn_us, "--ici-us": args.ici_us}).items():
        may_be_zero = name.endswith(("-ms", "-us"))
        if value < 0 or (value == 0 and not may_be_zero):
            raise ValueError(f"`{name}` must {'not be negative' if may_be_zero else 'be positive'}, got {value:g}.")
    link, compute = plan.Link(1e9 * args.dcn_gbps / 8, 1e-6 * args.dcn_us), 1e-3 * args.compute_ms
    inside = 0.0
    if args.chips > 1:
        ici = plan.Link(1e9 * args.ici_gbps / 8, 1e-6 * args.ici_us)
        inside = plan.allreduce_seconds(4 * args.params, args.chips, ici)
    return _text_of_plan(args.params, args.workers, compute, link, inside)


def _text_of_plan(params: float, workers: int, compute: float, link: plan.Link, inside: float) -> str:
    found = plan.ways(params, workers, compute, link, inside)
    title = f"{workers} workers, {params / 1e6:g} million parameters, {1e3 * compute:g} ms of compute, links of {link}"
    title += f", {1e3 * inside:.3g} ms inside a worker" if inside else ""
    rows = [(way.name, way.wire, f"{way.sent / 1e6:.4g} MB", _time(way.transfer), _time(way.step)) for way in found]
    fewer = [
        (group.gossiping, group.members, _time(group.averaging), _time(group.step))
        for group in plan.groups(params, workers, compute, link, inside)
    ]
    return "\n".join(
        [
            f"{title}\n",
            plan.as_table(("algorithm", "wire", "sent", "exchange", "step"), rows),
            "\nCrossover, during, saves 5 % of the step of AllReduce beside the backward pass, both in float32, "
            f"{_rates(plan.where_it_pays(params, workers, compute, link, inside))}.",
            "\nThe same workers in groups whose members average gradients over the same links (float32, during):\n",
            plan.as_table(("gossiping", "members", "averaging", "step"), fewer),
        ]
    )


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms" if seconds < 10 else f"{seconds:.4g} s"


def _rates(pays: tuple[float, float] | None) -> str:
    if pays is None:
        return "at no rate"
    low, high = (None if rate in plan.RATES[[0, -1]] else f"{8 * rate / 1e9:.3g} Gbit/s" for rate in pays)
    if low and high:
        return f"on links from {low} to {high}"
    return f"on links above {low}" if low else f"on links below {high}" if high else "at every rate"


def _text_of_fit(found: plan.Fit, rows: list[dict[str, str]]) -> str:
    of_steps, of_exchanges = found.errors(rows)
    lines = [
        (row["algorithm"], row["hosts"], row["rate"], row["compute_s"], row["step_s"], f"{predicted:.4g}")
        for row, predicted in zip(rows, found.predict(rows), strict=True)
    ]
    return "\n".join(
        [
            plan.as_table(("algorithm", "hosts", "rate", "compute, s", "step, s", "predicted, s"), lines),
            f"\nlatency {1e6 * found.latency:.3g} µs, {found.slowdown:.3f} times the transfer at the nominal rate; "
            f"median error of steps {100 * of_steps:.1f} %, of exchanges {100 * of_exchanges:.1f} %",
        ]
    )


def _pool(args: argparse.Namespace) -> topology.Pool:
    if args.name not in TOPOLOGIES:
        near = difflib.get_close_matches(args.name, TOPOLOGIES, n=1, cutoff=0.4)
        raise ValueError(
            f"{args.name!r} is not a topology; "
            + (f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TOPOLOGIES)}.")
        )
    takes = inspect.signature(TOPOLOGIES[args.name]).parameters
    options = {"max_degree" if "max_degree" in takes else "peers": args.peers, "seed": args.seed}
    options |= {"pool_size": args.pool_size}
    for name, value in options.items():
        if value is not None and name not in takes:
            raise ValueError(f"{args.name!r} takes no `--{name.replace('_', '-')}`, got {value}.")
    defaults = {"pool_size": topology.advised_pool_size(args.workers), "slices": args.slices}
    given = {name: value for name, value in options.items() if value is not None}
    return TOPOLOGIES[args.name](
        args.workers, **{name: value for name, value in (defaults | given).items() if name in takes}
    )


def _peers_heard(pool: topology.Pool) -> int:
    hears = (pool.share[:, 1:] > 0) & (pool.receive_from != np.arange(pool.num_workers))
    return int(hears.sum(1).max())


def _rounds_at_random(worst: float) -> int | None:
    if worst < 0.01:
        return 1
    return math.ceil(math.log(0.01) / math.log(worst)) if worst < 1 - 1e-9 else None


def _rounds_in_turn(pool: topology.Pool) -> int | None:
    # A shift costs one multiplication, any other round a singular value of all rounds so far.
    tried = 10_000 if topology.modes(pool) is not None else 100
    return topology.rounds_until(pool, itertools.islice(itertools.cycle(range(pool.num_rounds)), tried))


def _text(report: dict[str, Any]) -> str:
    contraction, exact = report["contraction"], report["exact_after"]
    lines = {
        "keeps agreement": "yes" if report["keeps_agreement"] else "no",
        "keeps the average": "yes" if report["keeps_mass"] else "no",
        "contraction": "worst {worst:.3f}, mean {mean:.3f}, ideal {ideal:.3f}".format(**contraction)
        + " (of squared disagreement, per round)",
        "rounds to a tenth": _by_order({k: v or "many" for k, v in report["rounds_to_a_tenth"].items()}),
    }
    for gamma, neighbors in report["effective_neighbors"].items():
        lines[f"neighbors, {gamma}"] = _by_order({k: f"{v:.1f}" for k, v in neighbors.items()}) + ", effectively"
    lines["exact average"] = f"after {exact} rounds in turn" if exact else "not in one pass"
    for sender, sent in report["messages"].items():
        if sender != "worker" and sent["max"] == 0:
            continue  # one host, or one slice: nothing leaves it
        count = "{min}" if sent["min"] == sent["max"] else "{min} to {max}"
        lines[f"messages per {sender}"] = count.format(**sent) + (", even" if sent["even"] else ", uneven")
    title = "{name}: workers {workers}, rounds {rounds}, peers {peers}".format(**report)
    return "\n".join([title, *(f"  {key:<22}{value}" for key, value in lines.items()), *_hints(report)])


def _by_order(values: dict[str, Any]) -> str:
    return ", ".join(f"{value} {order}" for order, value in values.items())


def _hints(report: dict[str, Any]) -> list[str]:
    advised = topology.advised_pool_size(report["workers"])
    if report["name"] != "latin" or report["rounds"] >= advised:
        return []
    return [f"  Take --pool-size {advised} or more: fewer shifts leave directions that hardly contract."]


if __name__ == "__main__":
    sys.exit(main())
