"""What a pool promises, in numbers and in words."""

import itertools
import math
from typing import Any

import numpy as np

from crossover_jax.topology.pool import Pool
from crossover_jax.topology.random import advised_pool_size
from crossover_jax.topology.spectral import (
    contraction,
    decay,
    effective_neighbors,
    ideal_contraction,
    messages,
    modes,
    rounds_until,
)

ORDERS = ("at random", "in turn")


def describe(pool: Pool, *, hosts: int = 1, slices: int = 1) -> dict[str, Any]:
    """What `pool` promises, as plain data: its mixing, and the messages that leave workers, hosts and slices.

    "at random" draws every round uniformly from the pool (`shuffle`, `sample`), "in turn" takes them in order
    (`rotate`, `cycle`). Rounds to a tenth are for the worst disagreement: in turn measured, at random the number after
    which its mean square is at most a hundredth; None: more than were tried. Messages are even when in every round all
    workers (hosts, slices) send equally many.

    >>> from crossover_jax.topology import exponential
    >>> describe(exponential(8))["exact_after"]
    3
    """
    worst, mean = contraction(pool)
    peers = _peers_heard(pool)
    left = decay(pool, range(pool.num_rounds))
    return {
        "workers": pool.num_workers,
        "rounds": pool.num_rounds,
        "peers": peers,
        "keeps_agreement": pool.keeps_agreement,
        "keeps_mass": pool.keeps_mass,
        "contraction": {"worst": worst, "mean": mean, "ideal": ideal_contraction(pool.num_workers, peers)},
        "rounds_to_a_tenth": {"at random": _rounds_at_random(worst), "in turn": _rounds_in_turn(pool)},
        "effective_neighbors": {
            f"gamma {gamma}": {order: effective_neighbors(pool, gamma, in_turn=order == "in turn") for order in ORDERS}
            for gamma in (0.9, 0.99)
        },
        # Exact up to rounding: what float64 leaves of 1 after as many averages as there are rounds.
        "exact_after": next((t for t, share in enumerate(left, start=1) if share < 1e-12), None),
        "messages": {
            sender: {"min": int(sent.min()), "max": int(sent.max()), "even": bool((sent == sent[:, :1]).all())}
            for sender, sent in messages(pool, hosts, slices)._asdict().items()
        },
    }


def as_text(name: str, report: dict[str, Any]) -> str:
    """The lines that the command line prints of what `describe` said, and a hint where a larger pool mixes better."""
    exact = report["exact_after"]
    lines = {
        "keeps agreement": "yes" if report["keeps_agreement"] else "no",
        "keeps the average": "yes" if report["keeps_mass"] else "no",
        "contraction": "worst {worst:.3f}, mean {mean:.3f}, ideal {ideal:.3f}".format(**report["contraction"])
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
    title = f"{name}: workers {report['workers']}, rounds {report['rounds']}, peers {report['peers']}"
    return "\n".join([title, *(f"  {key:<22}{value}" for key, value in lines.items()), *_hints(name, report)])


def _peers_heard(pool: Pool) -> int:
    hears = (pool.share[:, 1:] > 0) & (pool.receive_from != np.arange(pool.num_workers))
    return int(hears.sum(1).max())


def _rounds_at_random(worst: float) -> int | None:
    # `worst` is of squares, so a tenth is its hundredth. Drawn independently, t rounds leave worst**t on average.
    if worst < 0.01:
        return 1
    return math.ceil(math.log(0.01) / math.log(worst)) if worst < 1 - 1e-9 else None


def _rounds_in_turn(pool: Pool) -> int | None:
    # After a shift one multiplication tells what is left, after any other round a singular value of all rounds so far.
    tried = 10_000 if modes(pool) is not None else 100
    return rounds_until(pool, itertools.islice(itertools.cycle(range(pool.num_rounds)), tried))


def _by_order(values: dict[str, Any]) -> str:
    return ", ".join(f"{value} {order}" for order, value in values.items())


def _hints(name: str, report: dict[str, Any]) -> list[str]:
    advised = advised_pool_size(report["workers"])
    if name != "latin" or report["rounds"] >= advised:
        return []
    return [f"  Take --pool-size {advised} or more: fewer shifts leave directions that hardly contract."]
