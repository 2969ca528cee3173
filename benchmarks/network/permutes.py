"""What small programs of permutes take on hosts with limited links: messages alone, no packing, no averaging.

    sudo python -m benchmarks.network.permutes --hosts 8 --rate 200mbit --arms shift/1,shift/4,segments/6,mean
    sudo python -m benchmarks.network.permutes --hosts 8 --rate 200mbit --arms segments/6 --queued 4194304
    sudo python -m benchmarks.network.permutes --hosts 4 --rate 50mbit --params 1.25e6 --arms beside/1,beside/2,packed/2

One process per host on Gloo (`hosts.py`) with a vector of `--params` numbers, and one program per arm:

    shift/K     one permute of it, to the K-th next host: a swap where K is half of the hosts
    segments/S  S permutes, none a swap, each of an array with 1/S of it
    chained/S   as many, one after another: each sends on what the one before has brought
    all_to_all  1/(n - 1) of it to each of the n - 1 others
    mean        all hosts' mean of it, of which a ring sends 2 (n - 1)/n
    products    `--products` matrix products and no message
    beside/S    as many products, and the permutes of segments/S, which do not depend on them
    packed/S    the same with messages that the program puts together, from the halves of its arrays

Steps of all arms alternate, each after a barrier; a step takes as long as its slowest host, and the figure is their
median. The limit is payload / rate, or beside products what `products` takes, if that is longer; the ratios to it are
the median's, the shortest step's and the longest's. What a link sends in 10 ms passes at once.

`--queued` is what a connection may queue on its card, by default half of what passes at once; Linux 6.18 has 4 MB. With
`--after_idle 1`, the kernel's default, a connection that was idle starts slowly again. The CSV says what the kernel
had, not what it was asked for. `--check` compares what the first step brings with numpy's permutations of all hosts'
vectors, on each host.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from benchmarks.network import hosts, turns
from benchmarks.network.hosts import bits_per_second
from benchmarks.rows import append_rows
from crossover_jax.text import as_table

WIDTH = 512  # of the matrices
TCP = ("limit_output_bytes", "slow_start_after_idle")
COLUMNS = (
    *("arm", "hosts", "rate", "params", "products", "congestion", *TCP),
    *("step_s", "limit_s", "ratio", "shortest", "longest", "payload_bytes", "frame_bytes"),
)
COUNTED, WHOLE = ("shift", "segments", "chained", "beside", "packed"), ("all_to_all", "mean", "products")


class Arm(NamedTuple):
    """A program of one host's vectors, and by numpy what it should make of all hosts'."""

    sizes: list[int]
    sent: float  # numbers, by each host
    program: Callable[..., list]
    oracle: Callable[..., list]  # of arrays [hosts, size]
    has_products: bool = False


def parse_arm(text: str, n: int, size: int) -> Arm:
    """
    >>> parse_arm("chained/3", 4, 300).sizes
    [100]
    """
    name, _, number = text.partition("/")
    count = int(number) if number.isdigit() else 0
    if not (text in WHOLE or (name in COUNTED and count)):
        raise ValueError(f"an arm must be {', '.join(WHOLE)} or, with a number, {', '.join(COUNTED)}, got {text!r}.")
    if n < 3:
        raise ValueError(f"`--hosts` must be at least 3, for between two hosts every permute is a swap, got {n}.")
    if name == "shift" and count >= n:
        raise ValueError(f"a shift must be less than the {n} hosts, got {text!r}.")
    return make_whole(name, n, size) if name in ("all_to_all", "mean") else make_permutes(name, count, n, size)


def make_whole(name: str, n: int, size: int) -> Arm:
    """One collective of all hosts."""
    if name == "mean":
        sent = 2 * (n - 1) / n * size
        return Arm([size], sent, lambda x: [lax.pmean(x, "worker")], lambda x: [np.tile(x.mean(0), (n, 1))])
    piece = size // (n - 1)
    return Arm(
        [n * piece],
        (n - 1) * piece,
        lambda x: [lax.all_to_all(x, "worker", 0, 0, tiled=True)],
        lambda x: [x.reshape(n, n, piece).swapaxes(0, 1).reshape(n, -1)],
    )


def make_permutes(name: str, count: int, n: int, size: int) -> Arm:
    """One or several shifts, or products without one."""
    no_swaps = itertools.cycle(k for k in range(1, n) if 2 * k != n)
    shifts = [count] if name == "shift" else [*itertools.islice(no_swaps, count)]
    part = size // max(1, len(shifts))

    def ahead(x, k):
        return lax.ppermute(x, "worker", [(i, (i + k) % n) for i in range(n)])

    def apply(function, xs):
        return [function(x, k) for x, k in zip(xs, shifts, strict=True)]

    if name == "chained":
        chain = functools.partial(functools.reduce, ahead, shifts)
        return Arm([part], part * count, lambda x: [chain(x)], lambda x: [np.roll(x, sum(shifts), 0)])
    turn = part // 2 if name == "packed" else 0
    return Arm(
        [part] * len(shifts),
        part * len(shifts),
        lambda *xs: apply(ahead, [jnp.roll(x, turn) for x in xs] if turn else xs),
        lambda *xs: apply(lambda x, k: np.roll(x, (k, turn), (0, 1)), xs),
        name in ("products", "beside", "packed"),
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--rate", default="200mbit", help="of each link in each direction, as tc writes it")
    parser.add_argument("--params", type=float, default=5e6, help="float32 numbers of each host")
    parser.add_argument("--arms", default="shift/1,segments/6,chained/6,all_to_all,mean")
    parser.add_argument("--products", type=int, default=240, help=f"of matrices of {WIDTH} x {WIDTH}")
    parser.add_argument("--steps", type=int, default=7, help="of each arm")
    parser.add_argument("--queued", type=int, help="bytes that a connection may queue")
    parser.add_argument("--congestion", default=hosts.CONGESTION, help="its control: reno, bbr, cubic")
    parser.add_argument("--after_idle", type=int, choices=(0, 1), help="whether it starts slowly again")
    parser.add_argument("--check", action="store_true", help="compare with numpy")
    parser.add_argument("--out", type=pathlib.Path, help="CSV to which rows are added")
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)  # set for the processes on the hosts
    args = parser.parse_args(argv)
    try:
        if args.queued is not None and args.queued < 1:
            raise ValueError(f"`--queued` must be at least 1, got {args.queued}.")
        arms = {text: parse_arm(text, args.hosts, int(args.params)) for text in args.arms.split(",")}
        if any(arm.has_products for arm in arms.values()):  # their limit is what the products take by themselves
            arms.setdefault("products", parse_arm("products", args.hosts, 0))
        if args.host is not None:
            print(json.dumps(time_arms(args, arms)))
            return
        asked = zip(TCP, (args.queued, args.after_idle), strict=True)
        tcp = {name: value for name, value in asked if value is not None}
        outputs = hosts.run_self(args.hosts, args.rate, congestion=args.congestion, tcp=tcp)
    except (hosts.Missing, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    rows = make_rows(outputs, args, arms)
    shown = ("arm", *COLUMNS[COLUMNS.index("step_s") :])
    print(as_table(shown, [[row[name] for name in shown] for row in rows]))
    if args.out:
        append_rows(args.out, COLUMNS, rows)


def time_arms(args: argparse.Namespace, arms: dict[str, Arm]) -> dict[str, Any]:
    """Run on each host: seconds and frames of each arm's steps (`time_in_turns`), and the kernel's settings."""
    turns.join(args.host, args.hosts)
    mesh = cj.make_mesh(args.hosts)
    steps = [make_step(arm, args, mesh) for arm in arms.values()]
    return {**turns.time_in_turns(steps, args.steps), "kernel": read_kernel_settings()}


def make_step(arm: Arm, args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Callable[[int], Any]:
    def place(tree):
        sharding = NamedSharding(mesh, P("worker"))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x[None]), tree)

    def run(xs, w):
        return arm.program(*xs), [functools.reduce(jnp.matmul, [w] * args.products, w)] * arm.has_products

    run = cj.per_worker(run, mesh, donate=False)
    xs, w = place(make_vectors(args.host, arm)), place(np.eye(WIDTH, dtype=np.float32))

    def step(t: int) -> Any:
        arrived, products = run(xs, w)
        if t < 0 and args.check:  # the turn that is not timed
            check_arrivals(arrived, arm, args)
        return arrived, products

    return step


def check_arrivals(arrived: list[jax.Array], arm: Arm, args: argparse.Namespace) -> None:
    vectors = zip(*(make_vectors(host, arm) for host in range(args.hosts)), strict=True)
    for mine, all_hosts in zip(arrived, arm.oracle(*map(np.stack, vectors)), strict=True):
        np.testing.assert_allclose(mine.addressable_data(0)[0], all_hosts[args.host], rtol=1e-5)


def make_vectors(host: int, arm: Arm) -> list[np.ndarray]:
    random = np.random.default_rng(host)
    return [random.random(size, np.float32) for size in arm.sizes]


def read_kernel_settings() -> list[str | int]:
    """The congestion control of this host's connections to others, and its `TCP`."""
    sockets = subprocess.run(["ss", "-tinH", "dst", hosts.NETWORK], capture_output=True, text=True, check=True).stdout
    congestion = "+".join(name for name in ("reno", "bbr", "cubic") if f" {name} " in sockets)
    return [congestion, *(int(pathlib.Path(f"/proc/sys/net/ipv4/tcp_{name}").read_text()) for name in TCP)]


def make_rows(outputs: Sequence[dict], args: argparse.Namespace, arms: dict[str, Arm]) -> list[dict]:
    """The rows of the CSV, of what all hosts measured."""
    seconds = {text: turns.step_seconds(outputs, i) for i, text in enumerate(arms)}
    rows = []
    for i, (text, arm) in enumerate(arms.items()):
        taken, transfer_s = seconds[text], 32 * arm.sent / bits_per_second(args.rate)
        step_s = statistics.median(taken)
        limit_s = max(transfer_s, statistics.median(seconds["products"]) if arm.has_products else 0.0)
        values = (
            *(text, args.hosts, args.rate, int(args.params), args.products if arm.has_products else 0),
            *outputs[-1]["kernel"],  # host 0 has connections to itself too
            *(round(step_s, 4), round(limit_s, 4)),
            *(round(s / limit_s, 3) for s in (step_s, min(taken), max(taken))),
            *(round(4 * arm.sent), round(turns.mean_frames(outputs, i))),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
