"""Two minutes on one's own devices: whether exchanges are what they should be, and how long they take.

Each kind is compared with its matrices in numpy and with `plan`, for a link that is measured by messages of two sizes.
"""

import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crossover_jax import plan, topology
from crossover_jax.cuts import Cut, by_size, whole
from crossover_jax.mixing import Mix, average, gossip, is_channels, make_table
from crossover_jax.text import as_table
from crossover_jax.topology import Pool
from crossover_jax.workers import per_worker

Report = dict[str, Any]  # plain data
COUNTED = ("collective-permute", "collective-permute-start", "send", "conditional", "all-gather", "all-reduce")


class Kind(NamedTuple):
    """An exchange; without a pool it is an all-reduce."""

    name: str
    pool: Pool | None = None
    cut: Cut = whole()
    table: Any = topology.cycle
    wire: str = "float32"

    def mix(self) -> Mix:
        return gossip(self.pool, self.cut, self.table, wire=self.wire) if self.pool else average()

    def permutes(self) -> int | None:
        """How many there are in its program, if all rounds are channels."""
        if self.pool and is_channels(make_table(self.table, self.pool, self.cut), self.cut):
            return int((self.pool.receive_from != np.arange(self.pool.num_workers)).any(-1).sum())
        return None

    def planned(self, elements: int, link: plan.Link, n: int) -> float:
        peers = self.pool.num_peers if self.pool else 0
        size = elements * plan.BYTES[self.wire]
        return plan.gossip_seconds(peers * size, link) if peers else plan.allreduce_seconds(size, n, link)

    def expected(self, x: np.ndarray, step: int, devices: int) -> np.ndarray:
        """What matrices make of `[workers, elements]`; each device of a worker cuts its own part."""
        if not self.pool:
            return np.broadcast_to(x.mean(0), x.shape)
        table, matrix = make_table(self.table, self.pool, self.cut), self.pool.matrix
        parts = x.reshape(len(x), devices, self.cut.num_segments, -1)
        mixed = [np.tensordot(matrix(p), parts[:, :, s], 1) for s, p in enumerate(table[step % len(table)])]
        return np.stack(mixed, 2).reshape(x.shape)


def kinds(n: int) -> list[Kind]:
    """One exchange of each kind that algorithms are made of, for n workers."""
    pool = topology.latin(n, topology.advised_pool_size(n))
    crossover = Kind("crossover", pool, by_size(pool.num_rounds), topology.shuffle)
    return [
        crossover,
        crossover._replace(name="crossover in int8", wire="int8"),
        Kind("crossover_sgd_paper", topology.balanced(n, 4), by_size(4), topology.sample),
        Kind("sgp", topology.exponential(n)),
        Kind("d_psgd", topology.ring(n)),
        Kind("allreduce_sgd"),
    ]


class Trial(NamedTuple):
    """Exchanges on a mesh; its processes do the same in the same order."""

    mesh: Mesh
    turns: int

    @property
    def n(self) -> int:
        return self.mesh.shape["worker"]

    def size(self, kind: Kind, megabytes: float) -> int:
        """Elements of a model of about so many megabytes that all devices and segments divide."""
        unit = 1024 * self.mesh.size // self.n * kind.cut.num_segments
        return unit * max(1, round(megabytes * 1e6 / 4 / unit))

    def placed(self, x: Any) -> jax.Array:
        sharding = NamedSharding(self.mesh, P("worker") if np.ndim(x) else P())
        return jax.make_array_from_callback(np.shape(x), sharding, lambda at: np.asarray(x)[at])

    def compiled(self, step: Callable, *shapes: tuple[int, ...]) -> tuple[jax.stages.Compiled, list[jax.Array]]:
        """The program of all workers, and values for it."""
        at = NamedSharding(self.mesh, P("worker"))
        state = jax.jit(lambda: [jnp.ones((self.n, *shape)) for shape in shapes], out_shardings=at)()
        run = per_worker(step, self.mesh, replicated=(1,))
        return run.lower(state, self.placed(np.int32(0))).compile(), state

    def seconds(self, run: jax.stages.Compiled, state: Any) -> float:
        """Of one of four calls in a row, the fastest of the turns: who else is on the machine makes it only slower."""
        t, times = self.placed(np.int32(0)), []
        for _ in range(self.turns + 1):
            began = time.perf_counter()
            for _ in range(4):
                state = run(state, t)
            jax.block_until_ready(state)
            times.append((time.perf_counter() - began) / 4)
        return float(multihost_utils.broadcast_one_to_all(np.float32(min(times[1:]))))

    def link(self, megabytes: float, num_hosts: int) -> plan.Link:
        shift = max(1, self.n // num_hosts) % self.n or 1  # a host away, where there are several
        kind = Kind("permute", Pool.from_peers((np.arange(self.n)[None, None] - shift) % self.n, 0.5))
        sizes = [self.size(kind, size) for size in (megabytes / 64, megabytes)]
        small, large = (self.seconds(*self.compiled(kind.mix(), (size,))) for size in sizes)
        rate = 4 * (sizes[1] - sizes[0]) / max(large - small, 1e-9)
        return plan.Link(rate, max(0.0, small - 4 * sizes[0] / rate))

    def examine(self, kind: Kind, megabytes: float, link: plan.Link) -> Report:
        small, large = self.size(kind, 0.0), self.size(kind, megabytes)
        x, off = np.random.default_rng(0).random((self.n, small), np.float32), np.zeros(self.n)
        distance = jax.jit(lambda a, b: jnp.abs(a - b).max(1), out_shardings=NamedSharding(self.mesh, P()))
        run, _ = self.compiled(kind.mix(), (small,))
        for step in (0, 1):
            wanted = kind.expected(x, step, self.mesh.size // self.n).astype(np.float32)
            got = run([self.placed(x)], self.placed(np.int32(step)))
            off = np.maximum(off, distance(*got, self.placed(wanted)))
        run, state = self.compiled(kind.mix(), (large,))
        text = run.as_text() or ""
        return {
            "name": kind.name,
            "error": off.max().item(),  # NaN is the largest
            "worker": off.argmax().item(),
            "allowed": 2e-2 if kind.wire == "int8" else 1e-5,  # of values from 0 to 1
            "seconds": self.seconds(run, state),
            "planned": kind.planned(large, link, self.n),
            "permutes": kind.permutes(),
            "compiled": {name: len(re.findall(rf"[\])}}] {name}\(", text)) for name in COUNTED},
        }

    def beside(self, kind: Kind, megabytes: float) -> Report:
        """Seconds of an exchange, of products that take about as long, and of both in one program."""

        def products(a: jax.Array) -> jax.Array:
            for _ in range(8):
                a = jnp.tanh(a @ a)
            return a

        mix, size, width = kind.mix(), self.size(kind, megabytes), 128
        alone = self.seconds(*self.compiled(mix, (size,)))
        compute = self.seconds(*self.compiled(lambda s, t: [products(s[0])], (width, width)))
        while width < 8192 and compute < alone / 2:  # from below: larger products never take more than their cube
            width = min(8192, 128 * (1 + int(width / 128 * (alone / compute) ** (1 / 3))))
            compute = self.seconds(*self.compiled(lambda s, t: [products(s[0])], (width, width)))
        both = self.seconds(*self.compiled(lambda s, t: [mix(s[0], t), products(s[1])], (size,), (width, width)))
        hidden = (alone + compute - both) / min(alone, compute)
        return {"exchange": alone, "compute": compute, "both": both, "hidden": min(1.0, max(0.0, hidden))}


def examine(mesh: Mesh, *, megabytes: float = 32.0, turns: int = 3) -> Report:
    """Where workers lie, their link, and of each kind of exchange error, seconds and program; sizes of messages in MB.

    All processes call it alike. Raises `ValueError` for a mesh of one worker.

    >>> report = examine(jax.make_mesh((2,), ("worker",)), megabytes=0.1, turns=1)
    >>> max(found["error"] for found in report["exchanges"]) < 0.02
    True
    """
    trial = Trial(mesh, turns)
    if trial.n < 2:
        raise ValueError(f"`mesh` must have at least 2 workers, got {trial.n}: on a CPU pass `--devices 8`.")
    names = multihost_utils.process_allgather(np.frombuffer(socket.gethostname().encode().ljust(64)[:64], np.uint8))
    hosts = [bytes(name).decode().strip() for name in np.reshape(names, (-1, 64))]
    device, rows = mesh.devices.flat[0], mesh.devices.reshape(trial.n, -1).tolist()
    link = trial.link(megabytes, len(set(hosts)))
    return {
        "title": f"{trial.n} workers of {len(rows[0])} device(s), {device.device_kind}, JAX {jax.__version__}",
        "platform": device.platform,
        "hosts": hosts,  # of each process
        "workers": [[[d.id, d.process_index, getattr(d, "slice_index", 0) or 0] for d in row] for row in rows],
        "link": link._asdict(),
        "exchanges": [trial.examine(kind, megabytes, link) for kind in kinds(trial.n)],
        "beside": trial.beside(kinds(trial.n)[0], megabytes),
    }


def findings(report: Report) -> Iterator[str]:
    """What is not well, each in a sentence with what to do."""
    hosts, workers, exchanges = report["hosts"], report["workers"], report["exchanges"]
    if len(hosts) > len(set(hosts)) == 1:
        yield f"all {len(hosts)} processes are on {hosts[0]}, and no link is between them: start some on another host"
    tpu = report["platform"] == "tpu"  # a worker should not leave its slice, elsewhere its host
    homes = [{slice_ if tpu else hosts[process] for _, process, slice_ in worker} for worker in workers]
    if split := [i for i, own in enumerate(homes) if len(own) > 1]:
        yield f"workers {split} span slow links, which carry their gradients too: pass more `--workers`"
    for x in exchanges:
        name, found, times = f"`{x['name']}`", x["compiled"], x["seconds"] / x["planned"]
        if not x["error"] <= x["allowed"]:  # NaN is wrong too
            _, process, _ = workers[x["worker"]][0]
            where = f"worker {x['worker']}, process {process} on {hosts[process]}"
            yield f"{name} is {x['error']:.2g} off its matrices at {where}: do not train, send us the JSON"
        gathers = found["all-gather"] + found["all-reduce"] if len(workers[0]) == 1 else 0
        if x["permutes"] is not None and (_permutes(x) < x["permutes"] or found["conditional"] or gathers):
            yield f"{name} should be {x['permutes']} permutes alone, but is {found}: send us the JSON"
        if "int8" in x["name"]:
            if (times := x["seconds"] / exchanges[0]["seconds"]) > 1:
                yield f"{name} takes {times:.1f} times as long as float32 on this link: leave `wire` out"
        elif times > 1.5:
            advice = "try `in_flight=1`" if x["name"] == "crossover" else "plan with what was measured"
            yield f"{name} takes {times:.1f} times what `plan` expects: {advice}"
    if report["beside"]["hidden"] < 0.5:
        yield "an exchange hides little beside products: take `mix_after`, or measure your own step both ways"


def _permutes(x: Report) -> int:
    return sum(x["compiled"][name] for name in COUNTED[:3])


def as_text(report: Report) -> str:
    """The report for people."""
    rows = [
        (x["name"], f"{x['error']:.1g}", f"{1e3 * x['seconds']:.3g} ms", f"{1e3 * x['planned']:.3g} ms", _permutes(x))
        for x in report["exchanges"]
    ]
    gbps, us = (f"{scale * report['link'][key]:.4g}" for scale, key in ((8e-9, "rate"), (1e6, "latency")))
    table = as_table(("exchange", "error", "measured", "plan", "permutes"), rows)
    flags = f"--workers {len(report['workers'])} --dcn-gbps {gbps} --dcn-us {us}"
    return f"""{report["title"]}
link of a worker: {gbps} Gbit/s, {us} µs
beside products {100 * report["beside"]["hidden"]:.0f} % of an exchange hides

{table}

{chr(10).join(f"* {text}." for text in findings(report)) or "All is well."}

What to take: python -m crossover_jax plan {flags} --params P --compute-ms T"""
