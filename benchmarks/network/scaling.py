"""What a step takes on hosts with limited links, beside what the links allow: AllReduce, SGP and Crossover-SGD.

    sudo python -m benchmarks.network.scaling --hosts 8 --rate 200mbit --algorithms allreduce,sgp,crossover/7

One process per host on Gloo (`hosts.py`). An algorithm is a name and, behind slashes, its number of segments, a wire
format, `in_flight=k`, `rows`, `during`, `round`, `home`: crossover/12/int8/during. `crossover` is channels, `switch`
the other compiled form; with `rows` each segment has a part of every leaf. In `hierarchical` a worker is a host of two
devices, which average their gradients and send half of the model each. `round` is the exchange without the optimizer's
step. With `home` everybody hears himself: nothing is sent, and what is left is the time of packing, coding and
averaging by itself.

`--compute 1.5` puts a timed wait into each step, 1.5 times as long as one model's transfer takes at that rate: a
stand-in for the gradient, for the hosts share this machine's cores. `--real` puts matrix products there that take as
long when all hosts are at it.

Steps of all algorithms alternate, each after a barrier; a step takes as long as its slowest host, and the figure is
their median. `limit_s` is what the links allow: payload / rate, beside the compute with `during`, else behind it (what
a link sends in 10 ms passes at once, so that short transfers may take less). With `during` the exchange is a program of
its own here, and the compute no program: on CPUs JAX runs one program after another, and within one XLA may give
exchange and gradient the same memory, so that they wait for each other.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from benchmarks.network import hosts, turns
from benchmarks.network.hosts import bits_per_second
from benchmarks.rows import append_rows
from crossover_jax import topology
from crossover_jax.text import as_table
from crossover_jax.traced import wire_bytes
from crossover_jax.wire import WIRES

LEAVES = 8
DEVICES = 2  # of a host in `hierarchical`
WITH_OPTIONS = ("crossover", "switch", "hierarchical")
COLUMNS = (
    *("algorithm", "hosts", "rate", "params", "compute_s", "step_s", "limit_s", "ratio_to_limit"),
    *("payload_bytes", "frame_bytes"),
)


class Spec(NamedTuple):
    """An algorithm as the command line names it."""

    name: str
    segments: int = 0
    wire: str | None = None
    during: bool = False
    home: bool = False
    round: bool = False
    in_flight: int | None = None
    rows: bool = False


def parse_spec(text: str) -> Spec:
    """
    >>> parse_spec("crossover/12/int8")
    Spec(name='crossover', segments=12, wire='int8', during=False, home=False, round=False, in_flight=None, rows=False)
    """
    name, *options = text.split("/")
    spec = Spec(name)
    for option in options:
        if option.isdigit():
            spec = spec._replace(segments=int(option))
        elif option in WIRES:
            spec = spec._replace(wire=option)
        elif option.startswith("in_flight="):
            spec = spec._replace(in_flight=int(option.removeprefix("in_flight=")))
        elif option in ("during", "home", "round", "rows"):
            spec = spec._replace(**{option: True})
        else:
            raise ValueError(
                f"an option of {name!r} must be a number, a wire, in_flight=k, rows, during, round or home, "
                f"got {option!r}."
            )
    if name not in ALGORITHMS:
        raise ValueError(f"the algorithm must be one of {', '.join(ALGORITHMS)}, got {name!r}.")
    if options and name not in WITH_OPTIONS:
        raise ValueError(f"options must be for {' or '.join(WITH_OPTIONS)}, got {text!r}.")
    return spec


def make_mix(n: int, spec: Spec) -> cj.Mix:
    # Shifts that swap none: of two workers that swap, Gloo lets one send when the other is done.
    shifts = max(n - 1 - (n % 2 == 0), 1)
    segments = spec.segments or shifts
    rounds = shifts if spec.name == "switch" else max(p for p in range(1, shifts + 1) if segments % p == 0)
    pool = topology.latin(n, rounds, swaps=n == 2)
    if spec.home:
        pool = topology.Pool(np.broadcast_to(np.arange(n), pool.receive_from.shape), pool.share)
    table = topology.sample if spec.name == "switch" else topology.shuffle
    cut = (cj.by_rows if spec.rows else cj.by_size)(segments)
    return cj.gossip(pool, cut, table, wire=spec.wire, in_flight=spec.in_flight)


def make_gossip(n: int, spec: Spec) -> cj.Algorithm:
    if spec.round:
        mix = make_mix(n, spec)
        return cj.Algorithm(lambda params: (), lambda grads, state, params, step: (mix(params, step), state))
    return (cj.mix_during if spec.during else cj.mix_after)(optax.sgd(0.1), make_mix(n, spec))


ALGORITHMS: dict[str, Callable[[int, Spec], cj.Algorithm]] = {
    "alone": lambda n, spec: cj.mix_after(optax.sgd(0.1), cj.chain()),
    "allreduce": lambda n, spec: cj.allreduce_sgd(optax.sgd(0.1)),
    "sgp": lambda n, spec: cj.sgp(optax.sgd(0.1), n),
    "crossover": make_gossip,
    "switch": make_gossip,
    "hierarchical": make_gossip,
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--rate", default="200mbit", help="of each link in each direction, as tc writes it")
    parser.add_argument("--params", type=float, default=5e6, help="float32 parameters of the model")
    parser.add_argument("--algorithms", default="allreduce,sgp,crossover/12,switch/12")
    parser.add_argument("--compute", type=float, default=0.0, help="wait in each step, in transfers of one model")
    parser.add_argument("--compute_s", type=float, help="the same in seconds")
    parser.add_argument("--real", action="store_true", help="compute instead of waiting")
    parser.add_argument("--steps", type=int, default=10, help="of each algorithm")
    parser.add_argument("--out", type=pathlib.Path, help="CSV to which rows are added")
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)  # set for the processes on the hosts
    args = parser.parse_args(argv)
    try:
        specs = [parse_spec(text) for text in args.algorithms.split(",")]
        transfer_s = 32 * args.params / bits_per_second(args.rate)
        compute_s = args.compute * transfer_s if args.compute_s is None else args.compute_s
        if args.host is not None:
            print(json.dumps(time_steps(args, specs, compute_s)))
            return
        outputs = hosts.run_self(args.hosts, args.rate)
    except (hosts.Missing, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    rows = make_rows(outputs, args, specs, compute_s)
    print(as_text(rows))
    if args.out:
        append_rows(args.out, COLUMNS, rows)


def time_steps(args: argparse.Namespace, specs: Sequence[Spec], compute_s: float) -> dict[str, Any]:
    """Run on each host: seconds and frames of each algorithm's steps (`time_in_turns`), and its payload."""
    n, params = args.hosts, functools.partial(make_params, int(args.params))
    has_groups = any(spec.name == "hierarchical" for spec in specs)
    jax.config.update("jax_num_cpu_devices", DEVICES if has_groups else 1)
    turns.join(args.host, n)
    is_real = args.real and compute_s
    compute = make_products(compute_s) if is_real else functools.partial(time.sleep, compute_s)
    steps = [make_step(spec, n, params, compute) for spec in specs]
    return {"payload": [payload_bytes(spec, n, params) for spec in specs], **turns.time_in_turns(steps, args.steps)}


def make_step(spec: Spec, n: int, params: Callable[[], Any], compute: Callable[[], None]) -> Callable[[int], Any]:
    """A step of one algorithm, with its state in place."""
    mesh = cj.make_mesh(n, devices=[next(d for d in jax.devices() if d.process_index == i) for i in range(n)])
    algorithm, batch = ALGORITHMS[spec.name](n, spec), None
    if spec.name == "hierarchical":
        mesh = cj.make_mesh(n, {"device": DEVICES})
        examples = NamedSharding(mesh, P("worker", "device"))
        batch = jax.make_array_from_callback((n, DEVICES), examples, lambda index: np.full((1, 1), np.inf))
    if spec.during:
        update = make_step_during(make_mix(n, spec), mesh, batch, compute)
    else:
        update = make_step_after(algorithm, mesh, batch, compute)
    state = cj.copies(lambda: (params(), algorithm.init(params())), mesh)

    def step(t: int) -> Any:
        nonlocal state
        state = update(state, np.int32(t + 1))
        return state

    return step


def payload_bytes(spec: Spec, n: int, params: Callable[[], Any]) -> float:
    algorithm, one = ALGORITHMS[spec.name](n, spec), jax.eval_shape(params)
    state = jax.eval_shape(algorithm.init, one)
    return wire_bytes(lambda g, s, x: algorithm.update(g, s, x, 0), one, state, one, num_workers=n)


def make_params(num_params: int) -> dict[str, jax.Array]:
    return {str(i): jnp.full(num_params // LEAVES, 1.0, jnp.float32) for i in range(LEAVES)}


def gradients(params: Any, batch: jax.Array | None) -> Any:
    """Zeros that the compiler cannot fold away; with a batch, an infinity per device, an average over devices."""
    if batch is None:
        return jax.tree.map(lambda x: 0 * x, params)
    return jax.tree.map(lambda x: (x > batch[:, None]).astype(x.dtype).mean(0), params)


def make_step_after(
    algorithm: cj.Algorithm, mesh: Mesh, batch: jax.Array | None, compute: Callable[[], None]
) -> Callable:
    """The step of `mix_after`, whose exchange waits for the gradient."""

    def update(state, batch, step):
        params, inner = state
        return algorithm.update(gradients(params, batch), inner, params, step)

    run = cj.per_worker(update, mesh, replicated=(2,))

    def step(state, t):
        compute()
        return run(state, batch, t)

    return step


def make_step_during(mix: cj.Mix, mesh: Mesh, batch: jax.Array | None, compute: Callable[[], None]) -> Callable:
    """The step of `mix_during`, x <- W x + u, with W x in flight while the gradient is taken."""
    exchange = cj.per_worker(mix, mesh, replicated=(1,), donate=False)
    alone = cj.mix_after(optax.sgd(0.1), cj.chain())

    def update(mixed, state, batch, t):
        params, inner = state
        return alone.update(gradients(params, batch), inner, mixed, t)

    finish = cj.per_worker(update, mesh, replicated=(3,))

    def step(state, t):
        mixed = exchange(state[0], t)
        compute()
        return finish(mixed, state, batch, t)

    return step


def make_products(seconds: float) -> Callable[[], None]:
    """Matrix products, by numpy, that take so long when all hosts compute at once."""
    x, trial = np.eye(384, dtype=np.float32), 200

    def multiply(count: int) -> None:
        for _ in range(count):
            x @ x

    multiply(trial)
    multihost_utils.sync_global_devices("products")
    began = time.perf_counter()
    multiply(trial)
    mine = trial * seconds / (time.perf_counter() - began)
    return functools.partial(multiply, max(1, int(multihost_utils.process_allgather(np.float32(mine)).mean())))


def make_rows(outputs: Sequence[dict], args: argparse.Namespace, specs: Sequence[Spec], compute_s: float) -> list[dict]:
    """The rows of the CSV, of what all hosts measured."""
    rows = []
    for i, (text, spec) in enumerate(zip(args.algorithms.split(","), specs, strict=True)):
        step_s = statistics.median(turns.step_seconds(outputs, i))
        payload = statistics.mean(host["payload"][i] for host in outputs)
        transfer_s = 8 * payload / bits_per_second(args.rate)
        limit_s = max(compute_s, transfer_s) if spec.during else compute_s + transfer_s
        values = (
            *(text, args.hosts, args.rate, int(args.params), round(compute_s, 4), round(step_s, 4)),
            *(round(limit_s, 4), round(step_s / limit_s, 3) if limit_s else None),
            *(round(payload), round(turns.mean_frames(outputs, i))),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def as_text(rows: Sequence[dict]) -> str:
    lines = [
        (
            *(row["algorithm"], f"{row['step_s']:.3f} s", f"{row['limit_s']:.3f} s", row["ratio_to_limit"] or ""),
            *(f"{row[name] / 1e6:.2f} MB" for name in ("payload_bytes", "frame_bytes")),
        )
        for row in rows
    ]
    return as_table(("algorithm", "step", "limit", "ratio", "payload", "frames"), lines)


if __name__ == "__main__":
    main(sys.argv[1:])
