"""What a pool promises, in numbers, in words and as a picture."""

import itertools
import math
from typing import Any

import numpy as np

from crossover_jax.topology import spectral
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.random import advised_pool_size


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
    worst, mean = spectral.contraction(pool)
    hears = (pool.share[:, 1:] > 0) & (pool.receive_from != np.arange(pool.num_workers))
    peers = int(hears.sum(1).max())
    left = spectral.decay(pool, range(pool.num_rounds))
    # `worst` is of squares, so a tenth is its hundredth. Drawn independently, t rounds leave worst**t on average.
    at_random = math.ceil(math.log(0.01) / math.log(max(worst, 0.01))) if worst < 1 - 1e-9 else None
    # After a shift one multiplication tells what is left, after any other round a singular value of all rounds so far.
    tried = 10_000 if spectral.modes(pool) is not None else 100
    in_turn = spectral.rounds_until(pool, itertools.islice(itertools.cycle(range(pool.num_rounds)), tried))
    return {
        "workers": pool.num_workers,
        "rounds": pool.num_rounds,
        "peers": peers,
        "keeps_agreement": pool.keeps_agreement,
        "keeps_mass": pool.keeps_mass,
        "contraction": {"worst": worst, "mean": mean, "ideal": spectral.ideal_contraction(pool.num_workers, peers)},
        "rounds_to_a_tenth": {"at random": at_random, "in turn": in_turn},
        "effective_neighbors": {
            f"gamma {gamma}": {
                "at random": spectral.effective_neighbors(pool, gamma),
                "in turn": spectral.effective_neighbors(pool, gamma, in_turn=True),
            }
            for gamma in (0.9, 0.99)
        },
        # Exact up to rounding: what float64 leaves of 1 after as many averages as there are rounds.
        "exact_after": next((t for t, share in enumerate(left, start=1) if share < 1e-12), None),
        "messages": {
            sender: {"min": int(sent.min()), "max": int(sent.max()), "even": bool((sent == sent[:, :1]).all())}
            for sender, sent in spectral.messages(pool, hosts, slices)._asdict().items()
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
        "rounds to a tenth": ", ".join(f"{t or 'many'} {order}" for order, t in report["rounds_to_a_tenth"].items()),
    }
    for gamma, neighbors in report["effective_neighbors"].items():
        lines[f"neighbors, {gamma}"] = ", ".join(f"{n:.1f} {order}" for order, n in neighbors.items()) + ", effectively"
    lines["exact average"] = f"after {exact} rounds in turn" if exact else "not in one pass"
    for sender, sent in report["messages"].items():
        if sender == "worker" or sent["max"]:  # nothing leaves the only host, or the only slice
            count = "{min}" if sent["min"] == sent["max"] else "{min} to {max}"
            lines[f"messages per {sender}"] = count.format(**sent) + (", even" if sent["even"] else ", uneven")
    text = [f"{name}: workers {report['workers']}, rounds {report['rounds']}, peers {report['peers']}"]
    text += [f"  {key:<22}{value}" for key, value in lines.items()]
    if name == "latin" and report["rounds"] < (advised := advised_pool_size(report["workers"])):
        text.append(f"  Take --pool-size {advised} or more: fewer shifts leave directions that hardly contract.")
    return "\n".join(text)


def draw(name: str, pool: Pool, hosts: int, slices: int) -> Any:
    """A matplotlib figure: who hears whom, what is left of disagreement, what leaves workers, hosts and slices."""
    try:
        from matplotlib import collections, figure
    except ModuleNotFoundError:
        raise ValueError("`--plot` needs matplotlib, which is missing: `pip install matplotlib`.") from None
    picture = figure.Figure(figsize=(13, 4.2), layout="constrained")
    who, left, load = picture.subplots(1, 3)
    n, rounds = pool.num_workers, np.arange(pool.num_rounds)
    p, k, i = np.nonzero((pool.share[:, 1:] > 0) & (pool.receive_from != np.arange(n)))
    j = pool.receive_from[p, k, i]
    news = np.stack(list(itertools.accumulate(rounds, lambda x, p: pool.apply(p, x), initial=np.eye(n)[0])))
    colors, ends = np.where(news[p, j] > 0, "tab:blue", "lightgray"), np.stack([p, j, p + 1, i], 1).reshape(-1, 2, 2)
    who.add_collection(collections.LineCollection(ends.tolist(), colors=colors, linewidths=0.8))
    who.set(title=f"{name}: who hears whom; blue: news of worker 0", xlim=(0, len(rounds)), ylim=(n - 0.5, -0.5))
    t = np.arange(2 * max(len(rounds), 8) + 1)
    in_turn, at_random = spectral.decay(pool, t[:-1] % len(rounds)), spectral.contraction(pool).worst ** (t / 2)
    left.semilogy(t, np.maximum([1.0, *in_turn], 1e-4), t, np.maximum(at_random, 1e-4))
    left.set(title="disagreement left; blue: in turn, orange: at random", ylim=(1e-4, 1.5))
    for sender, sent in spectral.messages(pool, hosts, slices)._asdict().items():
        (line,) = load.plot(sent.mean(1), "o-", label=f"out of each {sender}")
        load.fill_between(rounds, sent.min(1), sent.max(1), alpha=0.3, color=line.get_color())
    load.set(title="messages by round; the band: least to most", ylim=(0, None))
    load.legend()
    return picture
