"""Our contenders: the tasks' models in JAX, and the algorithms, on hosts or simulated in one process.

    alone, allreduce, sgp, crossover, rows, rows/during, int8, int8/during, outer/16, outer/16/int8, streamed/16

`rows` is eight segments by rows, one channel after the other; `int8` three rounds in int8, by rows; `during` is that
order. `outer/H` is an outer step after each H steps, of one exchange in float32 or of three in int8, and `streamed/H`
one of H segments at each step. Outer steps are SGD with Nesterov's momentum, η 0.7 and μ 0.5.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import crossover_jax as cj
from benchmarks.network.contenders import tasks
from benchmarks.network.contenders.tasks import Task
from crossover_jax import topology
from crossover_jax.traced import wire_bytes

SEGMENTS = 8
OUTER = functools.partial(optax.sgd, 0.7, momentum=0.5, nesterov=True)
Params = dict[str, Any]


def mix_of(name: str, n: int) -> cj.Mix:
    """The exchange of `rows`, `int8` and their kin."""
    pool = topology.latin(n, max(p for p in range(1, max(n - 1 - (n % 2 == 0), 1) + 1) if SEGMENTS % p == 0))
    cut = cj.by_rows(SEGMENTS)
    if name == "int8":
        return cj.repeat(3, cj.crossover(n, pool=pool, cut=cut, wire="int8", in_flight=1))
    return cj.crossover(n, pool=pool, cut=cut, in_flight=1) if name == "rows" else cj.crossover(n)


def algorithm_of(text: str, optimizer: optax.GradientTransformation, n: int) -> cj.Algorithm:
    """An algorithm as the race names it. Raises `ValueError` for another name."""
    name, *options = text.split("/")
    if name in ("outer", "streamed"):
        every = int(options[0])
        if name == "outer":
            return cj.outer(optimizer, OUTER(), mix_of("int8" if "int8" in options else "rows", n), every)
        pool = topology.latin(n, topology.advised_pool_size(n))
        table = topology.stream(every, pool.num_rounds, every)
        return cj.outer(optimizer, OUTER(), cj.crossover(n, pool=pool, cut=cj.by_size(every), table=table), 1)
    if name in ("crossover", "rows", "int8"):
        return (cj.mix_during if "during" in options else cj.mix_after)(optimizer, mix_of(name, n))
    if name == "alone":
        return cj.mix_after(optimizer, cj.chain())
    if name in ("allreduce", "sgp"):
        return cj.allreduce_sgd(optimizer) if name == "allreduce" else cj.sgp(optimizer, n)
    raise ValueError(f"a contender must be one that `race.py` lists, got {text!r}.")


def logits(params: Params, x: jax.Array, task: Task) -> jax.Array:
    if "hidden" in task.sizes:
        x = jax.nn.relu(x @ params["layer0/kernel"] + params["layer0/bias"][None])
        return x @ params["layer1/kernel"] + params["layer1/bias"][None]
    x = params["embedding"][x.astype(jnp.int32)]
    for i in range(task.sizes["layers"]):
        own = {name.split("/")[1]: value for name, value in params.items() if name.startswith(f"layer{i}/")}
        x = x + _attention(_normal(x, own["before_attention"]), own, task.sizes["heads"])
        y = _normal(x, own["before_mlp"])
        x = x + (jax.nn.silu(y @ own["gate"]) * (y @ own["up"])) @ own["down"]
    return _normal(x, params["norm"]) @ params["head"]


def _normal(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale[None, None]


def _attention(x: jax.Array, own: Params, heads: int) -> jax.Array:
    batch, length, width = x.shape
    q, k, v = ((x @ own[name]).reshape(batch, length, heads, -1) for name in ("query", "key", "value"))
    scores = jnp.einsum("bihd,bjhd->bhij", _turned(q), _turned(k)) / math.sqrt(width // heads)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool))[None, None], scores, -jnp.inf)
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), v).reshape(batch, length, width) @ own["out"]


def _turned(x: jax.Array) -> jax.Array:
    """Rotary positions, of the halves of each head's features."""
    _, length, _, size = x.shape
    angle = np.outer(np.arange(length), 10_000.0 ** (-np.arange(0, size, 2) / size)).astype(np.float32)
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def loss(params: Params, inputs: jax.Array, labels: jax.Array, task: Task) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs, task), labels).mean()


def make_optimizer(task: Task, rate: jax.Array) -> optax.GradientTransformation:
    if task.optimizer == "sgd":
        return optax.sgd(rate, momentum=0.9)
    return optax.adamw(rate, b2=0.99, weight_decay=0.1)


def make_evaluate(task: Task, examples: tasks.Examples) -> Callable[[np.ndarray], float]:
    """Of a model's vector the accuracy, or the bits per byte."""

    @jax.jit
    def one(params, inputs, labels):
        of_all = logits(params, inputs, task)
        if task.is_loss:
            return optax.softmax_cross_entropy_with_integer_labels(of_all, labels).mean() / math.log(2)
        return (of_all.argmax(-1) == labels).mean(dtype=jnp.float32)

    size = 2_000 if not task.is_loss else 512
    starts = range(0, len(examples.labels) // size * size, size)

    def evaluate(vector: np.ndarray) -> float:
        params = tasks.as_params(vector, task)
        return float(np.mean([one(params, *(np.asarray(x[i : i + size]) for x in examples)) for i in starts]))

    return evaluate


def gradients(params: Params, batch: tuple[jax.Array, jax.Array], task: Task) -> Params:
    return jax.grad(loss)(params, *batch, task)


class Contender:
    """An algorithm's training, of all workers that `workers` has: a mesh of hosts, or a number to simulate."""

    def __init__(self, text: str, task: Task, n: int, workers: Any):
        self.text, self.task, self.n, self.workers = text, task, n, workers
        # On CPUs a program's exchange waits for its products, so it is a program of its own here, as in scaling.py.
        self.exchange = None
        if text.endswith("/during"):
            self.exchange = cj.per_worker(mix_of(text.split("/")[0], n), workers, replicated=(1,), donate=False)

        def update(state, mixed, batch, t, rate):
            params, inner = state
            optimizer = make_optimizer(task, rate)
            if mixed is None:
                algorithm = algorithm_of(text, optimizer, n)
            else:
                algorithm = cj.mix_during(optimizer, lambda params, step: mixed)
            return algorithm.update(gradients(params, batch, task), inner, params, t)

        self.update = cj.per_worker(update, workers, replicated=(3, 4))

    def begin(self, seed: int, highest: float) -> None:
        """The first state of a run."""
        self.highest = highest
        first = jax.tree.map(jnp.asarray, tasks.first_values(self.task, seed))
        algorithm = algorithm_of(self.text, make_optimizer(self.task, jnp.float32(0)), self.n)
        self.state = cj.copies(lambda: (first, algorithm.init(first)), self.workers)

    def step(self, t: int, batch: tasks.Examples, wait: float = 0.0) -> None:
        """`batch` is `[workers, examples of each, ...]` of this process; `wait` seconds stand for a gradient."""
        rate = np.float32(tasks.rate_at(t, self.task, self.highest))
        if wait:  # a gradient needs the parameters: without this the wait would hide the exchange of the step before
            jax.block_until_ready(self.state)
        mixed = self.exchange and self.exchange(self.state[0], np.int32(t))
        if wait:
            time.sleep(wait)
        arrays = (np.ascontiguousarray(x) for x in batch)
        labelled = tuple(x if isinstance(self.workers, int) else cj.from_local(x, self.workers) for x in arrays)
        self.state = self.update(self.state, mixed, labelled, np.int32(t), rate)

    def finish(self) -> None:
        jax.block_until_ready(self.state)

    def vectors(self) -> np.ndarray:
        """The models of this process's workers, `[workers, parameters]`."""
        params = {k: np.concatenate([s.data for s in x.addressable_shards]) for k, x in self.state[0].items()}
        count = len(next(iter(params.values())))
        return np.stack([tasks.as_vector({k: x[i] for k, x in params.items()}, self.task) for i in range(count)])


def payload_bytes(text: str, task: Task, n: int) -> float:
    """Bytes that a worker sends per step, from the traced program, averaged over a period."""
    algorithm = algorithm_of(text, make_optimizer(task, jnp.float32(0)), n)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in tasks.shapes(task).items()}
    state, every = jax.eval_shape(algorithm.init, params), tasks.period_of(text)
    sending = range(every - 1, 8 * every, every)

    def sent(step: int) -> float:
        return wire_bytes(lambda g, s, x: algorithm.update(g, s, x, step), params, state, params, num_workers=n)

    return sum(map(sent, sending)) / (8 * every)
