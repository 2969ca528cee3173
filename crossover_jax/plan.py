"""What a step takes on given links, from latency and rate: which algorithm, in which order and wire format, pays.

Every exchange costs α per message that waits for another, and its bytes over the link's rate (the α–β model). It knows
neither a slow worker nor a congested switch, nor the time of packing and coding.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 65 / 64}  # per parameter; of int8 with a scale for each 256
OUTER_BYTES = {**BYTES, "int4": 33 / 64}  # what outer steps may send too
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
    """As fast as an all-reduce can be: the bytes of a ring, 2 (n − 1) / n, and log2 n messages that wait for another.

    >>> allreduce_seconds(100.0, 4, Link(rate=100.0, latency=0.25))
    2.0
    """
    # Not attained together: a tree waits log2 n times and sends more, a ring sends least and waits 2 (n − 1) times.
    return math.ceil(math.log2(workers)) * link.latency + 2 * (workers - 1) / workers * num_bytes / link.rate


def gossip_seconds(num_bytes: float, link: Link, rounds: int = 1) -> float:
    """Rounds one after the other, in each all segments together: the number of workers does not appear.

    >>> gossip_seconds(100.0, Link(rate=100.0, latency=0.25), rounds=2)
    2.5
    """
    return rounds * (link.latency + num_bytes / link.rate)


def outer_ways(
    params: float, workers: int, compute: float, link: Link, inside: float = 0.0, every: Sequence[int] = (16, 64)
) -> list[Way]:
    """Ways that exchange after each `every` steps only, the fastest first; seconds and bytes are per step.

    "Overlapped" has all those steps to hide in (`outer(..., overlap=True)` in a `period`). They are not among `ways`,
    for less is exchanged, which costs accuracy: docs/language_models.md. Raises `ValueError` for `every` below 1.
    """

    def found() -> Iterator[Way]:
        work = max(compute, (1 - BACKWARD) * compute + inside)
        for k in every:
            if k < 1:
                raise ValueError(f"`every` must be at least 1, got {k}.")
            seconds = allreduce_seconds(4 * params, workers, link)
            sent = 2 * (workers - 1) / workers * 4 * params
            yield Way(f"DiLoCo, every {k}", "float32", sent / k, seconds, work + seconds / k)
            for wire, each in OUTER_BYTES.items():
                sent, seconds = each * params, gossip_seconds(each * params, link)
                yield Way(f"gossip outer, every {k}", wire, sent / k, seconds, work + seconds / k)
                yield Way(f"gossip outer, every {k}, overlapped", wire, sent / k, seconds, max(work, seconds / k))

    return sorted(found(), key=lambda way: (way.step, way.sent))


def ways(params: float, workers: int, compute: float, link: Link, inside: float = 0.0) -> list[Way]:
    """All ways to train with `workers` and exchange at every step, the fastest first; seconds.

    `inside` is what averaging gradients inside a worker takes, bucket by bucket beside the backward pass. AllReduce is
    there twice: all at once behind the gradient, and bucket by bucket too, as good implementations do. "Streamed" mixes
    a part of the model at each step (`stream`) where an exchange does not fit beside one: as fast, but slower to agree.
    Raises `ValueError` for fewer than two workers, for no parameters and for a time that is negative.
    """
    if workers < 2:
        raise ValueError(f"`workers` must be at least 2, got {workers}.")
    if params <= 0:
        raise ValueError(f"`params` must be positive, got {params:g}.")
    if compute < 0:
        raise ValueError(f"`compute` must not be negative, got {compute:g}.")
    # What travels beside the backward pass can begin when that begins; what comes after waits for the longer of both.
    forward = (1 - BACKWARD) * compute
    found, work = [], max(compute, forward + inside)
    for wire in ("float32", "bfloat16"):
        model = BYTES[wire] * params
        sent, seconds = 2 * (workers - 1) / workers * model, allreduce_seconds(model, workers, link)
        found.append(Way("allreduce", wire, sent, seconds, work + seconds))
        beside = max(compute, forward + inside + seconds)
        found.append(Way("allreduce, beside the backward pass", wire, sent, seconds, beside))
    for wire, each in BYTES.items():
        model = each * params
        for rounds in (1, 3) if wire == "int8" else (1,):
            name = "crossover" if rounds == 1 else f"crossover, {rounds} rounds"
            sent, seconds = rounds * model, gossip_seconds(model, link, rounds)
            found.append(Way(name, wire, sent, seconds, work + seconds))
            found.append(Way(f"{name}, during", wire, sent, seconds, max(work, seconds)))
        # Where an exchange takes longer than the work of a step, links carry a part of the model beside each.
        if work and (parts := math.ceil(gossip_seconds(model, link) / work)) > 1:
            seconds = link.latency + model / parts / link.rate
            name = f"crossover, streamed over {parts} steps"
            found.append(Way(name, wire, model / parts, seconds, max(work, seconds)))
    return sorted(found, key=lambda way: (way.step, way.sent))


RATES = np.geomspace(1e3, 1e14, 2201)  # bytes per second


def where_it_pays(
    params: float, workers: int, compute: float, link: Link, inside: float = 0.0
) -> tuple[float, float] | None:
    """The rates, in bytes per second, between which float32 gossip saves 5 % of AllReduce's step; None: at no rate.

    AllReduce is the one beside the backward pass, gossip the one that mixes `during`. With two workers both send the
    same, so where links are slow neither pays. An end of `RATES` stands for all beyond it.
    """

    def saves(rate: float) -> bool:
        found = ways(params, workers, compute, link._replace(rate=rate), inside)
        by_name = {way.name: way.step for way in found if way.wire == "float32"}
        return by_name["crossover, during"] < 0.95 * by_name["allreduce, beside the backward pass"]

    # Solved by trying: steps are maxima of sums, and a formula would have a case for each order of their terms.
    rates = [rate for rate in RATES.tolist() if saves(rate)]
    return (rates[0], rates[-1]) if rates else None


class Groups(NamedTuple):
    """Some gossiping workers, each of several members that average their gradients."""

    gossiping: int
    members: int
    averaging: float  # seconds, among members
    step: float  # seconds


def groups(
    params: float, workers: int, compute: float, link: Link, inside: float = 0.0, each: float = 4.0, rounds: int = 1
) -> list[Groups]:
    """The same workers as fewer that gossip (`during`), their members averaging gradients over the same links.

    For every number of members that divides `workers`. Of a worker's model each member sends its part, `each` bytes for
    a parameter in each of the `rounds`; first averages, beside the backward pass, then parameters have the link.
    """
    found = []
    for members in (m for m in range(workers // 2, 0, -1) if workers % m == 0):
        averaging = allreduce_seconds(4 * params, members, link)  # 0 for one
        sending = averaging + gossip_seconds(each * params / members, link, rounds)
        step = max(compute, (1 - BACKWARD) * compute + inside + averaging, sending)
        found.append(Groups(workers // members, members, averaging, step))
    return found


class Advice(NamedTuple):
    """What to take, and why."""

    take: str  # as one writes it
    gossiping: int  # workers; 1: none, all average their gradients
    members: int  # of each of them
    wire: str
    step: float  # seconds
    reason: str


MANY = 32  # workers, from which on one exchange per step was less accurate than three in int8: docs/results.md


def recommend(params: float, workers: int, compute: float, link: Link, inside: float = 0.0) -> Advice:
    """The algorithm that changes least of those whose step is at most 5 % longer than one without an exchange.

    AllReduce changes nothing. Else as few workers gossip as can, the others being members that average gradients over
    the same links; then as wide a wire as can. Three rounds in int8 come before one of any wire from 32 workers on.
    Where no exchange at every step fits, all workers take outer steps, overlapped and in int8, as often as can.

    It knows no memory and no accuracy (docs/results.md). Raises `ValueError` where `ways` does, and without compute.

    >>> advice = recommend(25.6e6, 8, compute=0.2, link=Link(rate=1.25e9, latency=5e-5))
    >>> advice.take, advice.gossiping, advice.members
    ('mix_during(opt, crossover(2))', 2, 4)
    """
    if compute <= 0:
        raise ValueError(f"`compute` must be positive to hide an exchange behind, got {compute:g}.")
    found = {(way.name, way.wire): way for way in ways(params, workers, compute, link, inside)}
    allreduce = found["allreduce, beside the backward pass", "float32"].step
    longest = 1.05 * max(compute, (1 - BACKWARD) * compute + inside)
    if allreduce <= longest:
        return Advice("allreduce_sgd(opt)", 1, workers, "float32", allreduce, "An all-reduce hides behind compute.")
    reason = f"An all-reduce would make a step {allreduce / longest * 1.05:.3g} times as long as its compute"
    for gossiping in (own.gossiping for own in groups(params, workers, compute, link, inside)):
        for wire, rounds in [("int8", 3)] * (gossiping >= MANY) + [(wire, 1) for wire in BYTES]:
            own = groups(params, workers, compute, link, inside, BYTES[wire], rounds)
            (step,) = (one.step for one in own if one.gossiping == gossiping)
            if step <= longest:
                mix = f"crossover({gossiping}{'' if wire == 'float32' else f', wire={wire!r}'})".replace("'", '"')
                mix = mix if rounds == 1 else f"repeat({rounds}, {mix})"
                reason += f"; {gossiping} workers are the fewest whose exchange hides, {wire} the widest wire."
                return Advice(f"mix_during(opt, {mix})", gossiping, workers // gossiping, wire, step, reason)
    seconds = gossip_seconds(BYTES["int8"] * params, link)
    every = math.ceil(seconds / longest)
    take = f'outer(opt, outer_opt, crossover({workers}, wire="int8"), every={every}, overlap=True)'
    reason += f", and no exchange hides behind one step; one in int8 hides behind {every}."
    return Advice(take, workers, 1, "int8", max(longest / 1.05, seconds / every), reason)
