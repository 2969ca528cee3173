"""One training step of one worker, and the same step for all workers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from crossover_jax import Algorithm, per_worker
from crossover_jax import period as period_of
from experiments import processes
from experiments.optimizers import NoteState

PyTree = Any
# (params, model_state, batch, key) -> (loss, (model_state, metrics))
LossFn = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, tuple[PyTree, PyTree]]]


class TrainState(NamedTuple):
    params: PyTree
    model_state: PyTree
    algorithm: PyTree


def init_state(params: PyTree, model_state: PyTree, algorithm: Algorithm) -> TrainState:
    """One worker's state before the first step."""
    return TrainState(params, model_state, algorithm.init(params))


def train_step(
    state: TrainState,
    batch: PyTree,
    step: jax.Array,
    *,
    loss_fn: LossFn,
    algorithm: Algorithm,
    seed: int | jax.Array,
    micro_batches: int = 1,
    specs: TrainState | None = None,
) -> tuple[TrainState, PyTree]:
    """One worker's step: gradients without communication, then the algorithm's update; metrics are this worker's.

    `micro_batches` is the paper's communication interval: so many equal parts of the batch, one after the other, whose
    gradients are averaged before the one optimizer step and the one round. Dropout keys differ between workers, steps
    and micro-batches. Gradients lie inside the worker as `specs.params` say. Raises `ValueError` if the batch cannot be
    divided.
    """
    params = algorithm.model(state.params, state.algorithm)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), lax.axis_index("worker"))
    gradients = jax.value_and_grad(loss_fn, has_aux=True)

    def one(model_state, micro_batch, i):
        (_, (model_state, metrics)), grads = gradients(params, model_state, micro_batch, jax.random.fold_in(key, i))
        if specs is not None:  # each device then reduces its own part, not all of them everything
            grads = jax.tree.map(lax.with_sharding_constraint, grads, specs.params)
        return model_state, (grads, metrics)

    if micro_batches == 1:
        model_state, (grads, metrics) = one(state.model_state, batch, 0)
    else:
        model_state, (grads, metrics) = _accumulate(one, state.model_state, batch, micro_batches)
    bad = jnp.stack([~jnp.isfinite(optax.tree.norm(leaf)) for leaf in jax.tree.leaves(grads)])
    metrics = {**metrics, "grad_norm": optax.tree.norm(grads), "bad_leaves": bad.sum(), "first_bad": bad.argmax()}
    params, own = algorithm.update(grads, state.algorithm, state.params, step)
    left_out = [x.is_left_out for x in jax.tree.leaves(own, is_leaf=_is_note) if _is_note(x)]
    if left_out:  # no number tells of an update that was left out: NaN, for which `fetch` looks
        metrics["update"] = jnp.where(jnp.stack(left_out).any(), jnp.nan, 0.0)
    return TrainState(params, model_state, own), metrics


def _is_note(node: Any) -> bool:
    return isinstance(node, NoteState)


def _accumulate(one: Callable, model_state: PyTree, batch: PyTree, micro_batches: int) -> tuple[PyTree, PyTree]:
    size = len(jax.tree.leaves(batch)[0])
    if size % micro_batches:
        raise ValueError(f"`micro_batches` must divide each worker's batch of {size}, got {micro_batches}.")
    parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
    model_state, total = one(model_state, jax.tree.map(lambda x: x[0], parts), 0)

    def add(carry, part):
        model_state, total = carry
        model_state, more = one(model_state, *part)
        return (model_state, jax.tree.map(jnp.add, total, more)), None

    rest = (jax.tree.map(lambda x: x[1:], parts), jnp.arange(1, micro_batches))
    (model_state, total), _ = lax.scan(add, (model_state, total), rest)
    return model_state, jax.tree.map(lambda x: x / micro_batches, total)


def make_train_step(
    loss_fn: LossFn,
    algorithm: Algorithm,
    workers: Mesh | int,
    *,
    seed: int | jax.Array = 0,
    micro_batches: int = 1,
    specs: TrainState | None = None,
    period: int = 1,
) -> jax.stages.Wrapped:
    """All workers' `(state, batch, step) -> (state, metrics)`, jitted; metrics stay per worker, `[workers]`.

    With a `period` it makes so many steps from `step` on, of batches and to metrics `[workers, period, ...]`.

    `state` and `batch` have a leading axis of workers, `step` is one replicated integer; `state` is donated. `workers`
    is a mesh or the number of workers to simulate on one device; `specs` is how the state lies inside a worker.
    """
    step = partial(
        train_step, loss_fn=loss_fn, algorithm=algorithm, seed=seed, micro_batches=micro_batches, specs=specs
    )
    whole = step if period == 1 else period_of(step, period)
    return per_worker(whole, workers, replicated=(2,), out_specs=(specs, None))


class Diverged(Exception):
    """A metric of some worker is no longer finite."""


def fetch(
    first_step: int, metrics: list[dict[str, jax.Array]], leaves: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Metrics of consecutive steps as numpy arrays `[steps, workers]`, on every process.

    Raises `Diverged`, naming the first step and worker of which one is not finite and, with the names of the `leaves`
    of a gradient, the first of its leaves.
    """
    fetched = processes.fetch(metrics)
    # Of a step `[workers]`, of a period `[workers, steps]`.
    by_step = [{name: x.reshape(len(x), -1).T for name, x in row.items()} for row in fetched]
    stacked = {name: np.concatenate([row[name] for row in by_step]) for name in by_step[0]}
    for i in range(len(next(iter(stacked.values())))):
        for name, values in stacked.items():
            wrong = np.flatnonzero(~np.isfinite(values[i]))
            if wrong.size:
                worker, detail = wrong[0], ""
                if leaves and (count := stacked["bad_leaves"][i, worker]):
                    detail = (
                        f"; its gradient is not finite in {count} of {len(leaves)} parameters, first in "
                        f"{leaves[stacked['first_bad'][i, worker]]}"
                    )
                raise Diverged(
                    f"{name} of worker {worker} is {values[i, worker]} at step {first_step + i} ({wrong.size} of "
                    f"{values.shape[1]} workers){detail}: lower `config.schedule.learning_rate`, or look at the data."
                )
    return stacked
