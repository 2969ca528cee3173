"""Accuracy and loss of the averaged model and of the workers' own."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crossover_jax import Algorithm, consensus_distance, mean_over_workers, per_worker
from experiments import processes
from experiments.step import TrainState, fetch

PyTree = Any
# (params, model_state, images) -> logits
Predict = Callable[[PyTree, PyTree, jax.Array], jax.Array]


def make_evaluate(
    predict: Predict, algorithm: Algorithm, workers: Mesh | int, specs: TrainState | None = None, *, each: bool = True
) -> Callable[[int, TrainState, Iterable[PyTree]], dict[str, float]]:
    """A function `(step, state, batches) -> metrics` under the keys of `metrics.jsonl`.

    Batches are numpy's, with `image`, `label` and a `mask` of the examples that count, `[rows, ...]`, the same for all
    workers. The averaged model has the average of the workers' parameters and of their BatchNorm statistics. On a mesh
    the number of rows must be a multiple of the devices that share them; `specs` is how the state lies inside a worker.
    Without `each` only the averaged model is evaluated, which is as many times faster as there are workers.
    The function raises `Diverged`, naming `step`.
    """
    totals = partial(_totals, predict)
    models = per_worker(
        lambda s: (algorithm.model(s.params, s.algorithm), s.model_state),
        workers,
        out_specs=None if specs is None else (specs.params, specs.model_state),
        donate=False,
    )
    of_mean = jax.jit(totals)
    if isinstance(workers, int):
        of_workers = jax.jit(lambda models, batch: jax.lax.map(lambda own: totals(own, batch), models))
        place_for_mean = place_for_workers = jax.device_put
    else:
        of_workers = per_worker(totals, workers, replicated=(1,), donate=False)
        # Of the averaged model there is one, all devices share its examples; of the others, those of one worker.
        shared = batch_axes(workers)
        place_for_mean = partial(processes.place, sharding=NamedSharding(workers, P(("worker", *shared))))
        place_for_workers = partial(processes.place, sharding=NamedSharding(workers, P(shared)))

    def evaluate(step: int, state: TrainState, batches: Iterable[PyTree]) -> dict[str, float]:
        own = models(state)
        averaged = mean_over_workers(own)
        counts: list[PyTree] = []
        for batch in batches:
            # One batch late. Of XLA:CPU's devices some wait for the others in a sum; with dozens of programs queued
            # the last of them is never started, and after 40 s the process aborts.
            jax.block_until_ready(counts[-1:])
            of_each = of_workers(own, place_for_workers(batch)) if each else None
            counts.append((of_mean(averaged, place_for_mean(batch)), of_each))
        distance = consensus_distance(own[0])
        (right, loss, count), of_each = processes.fetch(_sum(counts))
        fetch(step, [{"evaluation loss": np.ravel(loss if of_each is None else of_each[1]) / count}])
        row = {"eval/mean/accuracy": float(right / count), "eval/mean/loss": float(loss / count)}
        if of_each is not None:
            row |= _accuracies(of_each[0], count)
        return {**row, "consensus_distance": float(jax.device_get(distance))}

    return evaluate


def _accuracies(right: np.ndarray, count: int) -> dict[str, float]:
    """Of the workers' own models, from how many of all labels each has right."""
    return {
        "eval/workers/accuracy": float(right.mean() / count),
        "eval/workers/accuracy_min": float(right.min() / count),
        "eval/workers/accuracy_max": float(right.max() / count),
    }


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes inside a worker whose devices share its examples; those of "tensor" all work on the same."""
    return tuple(name for name in mesh.axis_names if name not in ("worker", "tensor"))


@jax.jit
def _sum(trees: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *x: sum(x), *trees)


def _totals(predict: Predict, model: tuple[PyTree, PyTree], batch: PyTree):
    """Number of right answers, sum of losses and number of labels of one batch, of its examples that count."""
    logits = predict(*model, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    counts = jnp.broadcast_to(jnp.expand_dims(batch["mask"], range(1, losses.ndim)), losses.shape)
    right = (logits.argmax(-1) == batch["label"]) & counts
    return right.sum(), jnp.where(counts, losses, 0).sum(), counts.sum()
