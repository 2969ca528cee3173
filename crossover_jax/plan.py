"""What a step takes on given links, from latency and rate: which algorithm, in which order and wire format, pays.

Every exchange costs α per message that waits for another, and its bytes over the link's rate (the α–β model). It knows
neither a slow worker nor a congested switch, nor the time of packing and coding.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 65 / 64}  # per parameter; of int8 with a scale for each 256
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}  # per second
BACKWARD = 2 / 3  # of a gradient's time: what gradients of the last layers can travel beside


class Link(NamedTuple):
    """A link of every worker, the same in both directions."""

    rate: float  # bytes per second
    latency: float  # seconds

    def __str__(self) -> str:
        return f"{8 * self.rate / 1e9:g} Gbit/s, {1e6 * self.latency:g} µs"


class Way(NamedTuple):
    """An algorithm with its order and wire format, and what it costs per step."""

    name: str
    wire: str
    sent: float  # bytes per worker and step
    transfer: float  # seconds of the exchange by itself
    step: float  # seconds of a step


def allreduce_seconds(num_bytes: float, workers: int, link: Link) -> float:
    """A ring's bytes and a tree's latency, which no all-reduce goes below: 2 (n − 1) / n of the bytes, 2 log2 n waits.

    >>> allreduce_seconds(100.0, 4, Link(rate=100.0, latency=0.25))
    2.5
    """
    return 2 * math.ceil(math.log2(workers)) * link.latency + 2 * (workers - 1) / workers * num_bytes / link.rate


def gossip_seconds(num_bytes: float, link: Link, rounds: int = 1) -> float:
    """Rounds one after the other, in each all segments together: the number of workers does not appear.

    >>> gossip_seconds(100.0, Link(rate=100.0, latency=0.25), rounds=2)
    2.5
    """
    return rounds * (link.latency + num_bytes / link.rate)


def ways(params: float, workers: int, compute: float, link: Link, inside: float = 0.0) -> list[Way]:
    """All ways to train with `workers`, the fastest first; seconds.

    `inside` is what averaging gradients inside a worker takes, bucket by bucket beside the backward pass. AllReduce is
    there twice: all at once behind the gradient, and bucket by bucket too, as good implementations do.

    Raises `ValueError` for fewer than two workers, for no parameters and for a time that is negative.
    """
    if workers < 2:
        raise ValueError(f"`workers` must be at least 2, got {workers}.")
    if params <= 0:
        raise ValueError(f"`params` must be positive, got {params:g}.")
    if compute < 0:
        raise ValueError(f"`compute` must not be negative, got {compute:g}.")
    forward = (1 - BACKWARD) * compute
    found, own = [], max(compute, forward + inside)
    for wire in ("float32", "bfloat16"):
        model = BYTES[wire] * params
        sent, seconds = 2 * (workers - 1) / workers * model, allreduce_seconds(model, workers, link)
        found.append(Way("allreduce", wire, sent, seconds, own + seconds))
        beside = max(compute, forward + inside + seconds)
        found.append(Way("allreduce, beside the backward pass", wire, sent, seconds, beside))
    for wire, each in BYTES.items():
        model = each * params
        for rounds in (1, 3) if wire == "int8" else (1,):
            name = "crossover" if rounds == 1 else f"crossover, {rounds} rounds"
            sent, seconds = rounds * model, gossip_seconds(model, link, rounds)
            found.append(Way(name, wire, sent, seconds, own + seconds))
            found.append(Way(f"{name}, during", wire, sent, seconds, max(own, seconds)))
        if own and (parts := math.ceil(gossip_seconds(model, link) / own)) > 1:
            seconds = link.latency + model / parts / link.rate
            name = f"crossover, streamed over {parts} steps"
            found.append(Way(name, wire, model / parts, seconds, max(own, seconds)))
    return sorted(found, key=lambda way: (way.step, way.sent))


def break_even(params: float, workers: int, compute: float, link: Link, inside: float = 0.0) -> float | None:
    """The rate, in bytes per second, from which on float32 gossip saves less than 5 % of AllReduce's step.

    AllReduce is the one beside the backward pass, gossip the one that mixes `during`. None: it never saves as much.
    """

    def saves(rate: float) -> bool:
        by_name = {
            way.name: way.step
            for way in ways(params, workers, compute, Link(rate, link.latency), inside)
            if way.wire == "float32"
        }
        return by_name["crossover, during"] < 0.95 * by_name["allreduce, beside the backward pass"]

    rates = [rate for rate in np.geomspace(1e3, 1e14, 2201).tolist() if saves(rate)]
    return rates[-1] if rates else None


def groups(params: float, workers: int, compute: float, link: Link) -> list[tuple[int, Way, float]]:
    """The same accelerators as fewer gossiping workers that average their members' gradients over the same links.

    (gossiping workers, the fastest float32 way of gossip, seconds of averaging inside a worker) for every power of two.
    """
    found = []
    for n in (2**i for i in range(1, int(math.log2(workers)) + 1)):
        inside = allreduce_seconds(4 * params, workers // n, link) if n < workers else 0.0
        of_gossip = [way for way in ways(params, n, compute, link, inside) if way.name == "crossover, during"]
        found.append((n, next(way for way in of_gossip if way.wire == "float32"), inside))
    return found


class Fit(NamedTuple):
    """What measurements say of links: how long a message waits, how many times the nominal transfer it takes."""

    latency: float  # seconds
    slowdown: float
    predicted: tuple[float, ...]  # seconds, of all rows
    error: float  # median of |predicted / measured - 1|


def fit(rows: Sequence[Mapping[str, Any]]) -> Fit:
    """Latency and slowdown from measured steps, as `benchmarks/scaling.py` writes them.

    Least squares of relative errors, over the steps whose exchange comes after the gradient: beside it, its time does
    not show. Raises `ValueError` where there are none.
    """
    waits = [_waits(row["algorithm"], int(row["hosts"])) if float(row["payload_bytes"]) else 0 for row in rows]
    transfers = [8 * float(row["payload_bytes"]) / bits_per_second(row["rate"]) for row in rows]
    measured, compute = (np.array([float(row[name]) for row in rows]) for name in ("step_s", "compute_s"))
    during = np.array(["during" in row["algorithm"] for row in rows])
    cost = np.stack([waits, transfers], axis=1)
    used = ~during & (cost[:, 1] > 0)
    if not used.any():
        raise ValueError("the measurements must have steps with an exchange after the gradient, got none.")
    weight = 1 / measured[used]
    coefficients, *_ = np.linalg.lstsq(cost[used] * weight[:, None], (measured - compute)[used] * weight, rcond=None)
    if coefficients[0] < 0:  # too small to be seen
        slope = (cost[used, 1] * weight) @ ((measured - compute)[used] * weight) / np.sum((cost[used, 1] * weight) ** 2)
        coefficients = np.array([0.0, slope])
    exchange = cost @ coefficients
    predicted = np.where(during, np.maximum(compute, exchange), compute + exchange)
    error = float(np.median(np.abs(predicted / measured - 1)))
    latency, slowdown = coefficients.tolist()
    return Fit(latency, slowdown, tuple(predicted.tolist()), error)


def _waits(algorithm: str, hosts: int) -> int:
    return 2 * math.ceil(math.log2(hosts)) if algorithm.startswith("allreduce") else 1


def bits_per_second(rate: str) -> float:
    """A rate as `tc` writes it.

    >>> bits_per_second("200mbit")
    200000000.0
    """
    for unit, factor in UNITS.items():
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise ValueError(f"a rate must end with one of {', '.join(UNITS)}, got {rate!r}.")


def read(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def as_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Columns as wide as their widest entry, the first to the left."""
    lines = [[str(entry) for entry in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [entry.ljust(w) if i == 0 else entry.rjust(w) for i, (entry, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)
