"""From a config to what is run: mesh, model, algorithm, step and placements."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax.leaves import flatten
from crossover_jax.traced import wire_bytes
from experiments import data, models, processes
from experiments.algorithms import make_algorithm, own_keys
from experiments.evaluate import batch_axes
from experiments.optimizers import make_optimizer
from experiments.step import TrainState, init_state, make_train_step

PyTree = Any


class Program(NamedTuple):
    """What a config, a data set's shapes and a mesh make: shared by training and by the preflight."""

    algorithm: cj.Algorithm
    apply: Callable
    leaves: list[str]  # of a gradient: the names of its parameters
    init: Callable[[], TrainState]  # one worker's first state
    shapes: TrainState  # of one worker's state
    specs: TrainState | None  # how it lies inside a worker; None where workers are simulated
    step: jax.stages.Wrapped  # all workers' (state, batch, step) -> (state, metrics), of `config.period` steps
    batch_part: Callable[[tuple[int, int]], tuple[slice, slice]]  # of [workers, per worker], this process's
    place_batch: Callable[[Sequence[PyTree]], PyTree]  # of the steps of a period
    place_step: Callable[[int], jax.Array]

    def predict(self, params: PyTree, model_state: PyTree, image: jax.Array) -> jax.Array:
        """Logits, as in evaluation."""
        return self.apply(params, model_state, image, train=False)[0]


def make_program(
    config: ml_collections.ConfigDict,
    dataset: data.Dataset,
    workers: Mesh | int,
    num_steps: int,
    *,
    seed: int | jax.Array | None = None,
    learning_rate: jax.Array | None = None,
) -> Program:
    """Nothing is computed yet. Raises `ValueError` for settings that do not fit together.

    `seed` and `learning_rate` stand for the config's; traced, they make one compiled program of many runs.
    """
    seed = config.seed if seed is None else seed
    graphdefs = []

    def build() -> tuple[PyTree, PyTree]:
        graphdef, params, model_state = models.build(
            config.model.name,
            num_classes=dataset.num_classes,
            image_shape=dataset.image_shape,
            seed=seed,
            **config.model.options,
        )
        graphdefs.append(graphdef)
        return params, model_state

    params, model_state = jax.eval_shape(build)
    graphdef = graphdefs[0]
    of_params = None if isinstance(workers, int) else param_specs(config, workers, graphdef, params, model_state)
    optimizer = make_optimizer(config, num_steps, learning_rate)
    algorithm = make_algorithm(config, optimizer, params, of_params)
    shapes = jax.eval_shape(partial(init_state, algorithm=algorithm), params, model_state)
    specs = None
    if of_params is not None:
        specs = TrainState(of_params, P(), cj.state_specs(shapes.algorithm, params, of_params))
    apply = make_apply(graphdef, dataset)
    loss = partial(loss_fn, apply, label_smoothing=config.label_smoothing)
    step = make_train_step(
        loss,
        algorithm,
        workers,
        seed=seed,
        micro_batches=config.micro_batches,
        specs=specs,
        period=config.period,
    )
    names, _, _ = flatten(params)

    def init() -> TrainState:
        return init_state(*build(), algorithm)

    return Program(algorithm, apply, names, init, shapes, specs, step, *placements(workers, config.period))


def param_specs(
    config: ml_collections.ConfigDict, mesh: Mesh, graphdef: Any, params: PyTree, model_state: PyTree
) -> PyTree:
    """How parameters lie inside a worker: as the model's annotations say, or big leaves over the axis "fsdp"."""
    annotated = models.annotations(graphdef, params, model_state)
    if annotated is not None:
        return cj.on_mesh(annotated, mesh)
    if config.inner.tensor > 1:
        raise ValueError(
            f"`config.inner.tensor` must be 1 for {config.model.name}, which does not say how to split its layers, "
            f"got {config.inner.tensor}."
        )
    return cj.fsdp_specs(params, mesh)


def steps_of(config: ml_collections.ConfigDict, dataset: data.Dataset) -> int:
    """How many steps a run has: `config.steps`, or the whole periods of `config.epochs`.

    Raises `ValueError` for steps that are no whole periods.
    """
    if config.steps is None:
        return config.period * max(1, round(config.epochs * (len(dataset) / config.batch_size) / config.period))
    if config.steps % config.period:
        raise ValueError(f"`config.steps` must be a multiple of `config.period` = {config.period}, got {config.steps}.")
    return config.steps


def tokens_per_example(config: ml_collections.ConfigDict) -> int | None:
    """Bytes of an example of text; None for images."""
    return config.dataset.sequence if config.dataset.name == "text" else None


def train_batches(
    config: ml_collections.ConfigDict,
    dataset: data.Dataset,
    part: Callable[[tuple[int, int]], tuple[slice, slice]],
    start_step: int = 0,
    rollbacks: int = 0,
) -> Iterator[PyTree]:
    """This process's part of each batch, as numpy arrays `[local workers, local examples of each, ...]`.

    After `rollbacks` from a loss that was not finite the examples come in another order.
    """
    seed = config.seed
    if rollbacks:
        seed = int(np.random.SeedSequence((config.seed, rollbacks)).generate_state(1)[0])
    return data.train_batches(
        dataset,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        seed=seed,
        start_step=start_step,
        augment=config.dataset.augment,
        part=part((config.num_workers, config.batch_size // config.num_workers)),
    )


def place_workers(config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> Mesh | int:
    """A mesh of workers, or their number where one device simulates them all.

    The devices of a worker are `config.inner.fsdp` × `config.inner.tensor` × what is left, which is data parallel; axes
    of one device are left out. Raises `ValueError` if the workers do not divide the devices, the inner axes a worker's
    devices, or what shares the examples a batch.
    """
    fsdp, tensor = config.inner.fsdp, config.inner.tensor
    if config.simulate == "yes" or (config.simulate == "auto" and len(devices) == 1):
        if jax.process_count() > 1:
            raise ValueError(f"`config.simulate` must be 'auto' or 'no' for many processes, got {config.simulate!r}.")
        if fsdp * tensor > 1:
            raise ValueError(
                f"`config.inner.fsdp` and `config.inner.tensor` must be 1 where workers are simulated, got {fsdp} and "
                f"{tensor}."
            )
        return config.num_workers
    each, left = divmod(len(devices), config.num_workers)
    if left:
        raise ValueError(
            f"`config.num_workers` must divide the number of devices, {len(devices)}, got {config.num_workers}: pass "
            "--config.simulate=yes, or on CPU set JAX_NUM_CPU_DEVICES to the number of workers."
        )
    shared, left = divmod(each, fsdp * tensor)
    if left:
        raise ValueError(
            f"`config.inner.fsdp` times `config.inner.tensor` must divide the {each} devices of a worker, got {fsdp} "
            f"and {tensor}."
        )
    sharing = len(devices) // tensor
    for key in ("batch_size", "eval_batch_size"):
        if config[key] % sharing:
            raise ValueError(
                f"`config.{key}` must be a multiple of the {sharing} devices that share it, got {config[key]}."
            )
    inner = {"data": shared, "fsdp": fsdp, "tensor": tensor}
    return cj.make_mesh(config.num_workers, {k: v for k, v in inner.items() if v > 1}, devices=devices)


def placements(workers: Mesh | int, period: int = 1) -> tuple[Callable, Callable, Callable]:
    """Which part of `[workers, per worker]` this process reads, and what puts batches and the step in place."""

    def together(batches: Sequence[PyTree]) -> PyTree:
        if period == 1:
            return batches[0]
        return jax.tree.map(lambda *x: np.stack(x, 1), *batches)  # [workers, period, per worker, ...]

    if isinstance(workers, int):
        return (
            lambda shape: (slice(0, shape[0]), slice(0, shape[1])),
            lambda batches: jax.device_put(together(batches)),
            lambda t: jax.device_put(np.int32(t)),
        )
    spec, everywhere = P(batch_axes(workers)), NamedSharding(workers, P())
    return (
        partial(cj.local_part, workers=workers, spec=spec),
        lambda batches: cj.from_local(together(batches), workers=workers, spec=batch_spec(workers, period)),
        lambda t: processes.place(np.int32(t), everywhere),
    )


def batch_spec(mesh: Mesh, period: int) -> P:
    """How the batches of a period, one worker's `[period, per worker, ...]`, lie on its devices; of one step alone."""
    return P(batch_axes(mesh)) if period == 1 else P(None, batch_axes(mesh))


def make_apply(graphdef: Any, dataset: data.Dataset) -> Callable:
    """`(params, model_state, image, *, train, key=None) -> (logits, model_state)` on the data set's uint8 `image`.

    Text is not normalised: its bytes are the model's tokens.
    """

    def apply(params, model_state, image, *, train, key=None):
        image = normalised(image, dataset.mean, dataset.std) if dataset.mean else image
        return models.apply(graphdef, params, model_state, image, train=train, key=key)

    return apply


def normalised(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 pixels `[rows, height, width, channels]` to float32 of mean 0 and standard deviation 1 per channel."""
    centre, scale = (np.asarray(x, np.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    return (image.astype(jnp.float32) / 255 - centre) / scale


def loss_fn(
    apply: Callable,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    label_smoothing: float = 0.0,
):
    """Cross-entropy of one worker's batch, averaged over all labels, its new model state and metrics.

    Of each label `label_smoothing` is shared evenly by the other classes.
    """
    logits, model_state = apply(params, model_state, batch["image"], train=True, key=key)
    if label_smoothing:
        classes = logits.shape[-1]
        labels = jax.nn.one_hot(batch["label"], classes)
        labels = optax.smooth_labels(labels, label_smoothing * classes / (classes - 1))  # which shares it by all
        loss = optax.softmax_cross_entropy(logits, labels).mean()
    else:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    accuracy = (logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32)
    return loss, (model_state, {"loss": loss, "accuracy": accuracy})


def wire_bytes_per_step(algorithm: cj.Algorithm, params: PyTree, config: ml_collections.ConfigDict) -> float:
    """Bytes that a worker sends per step, from the traced program, averaged over workers and the first rounds.

    Over eight of them, or until a reference is renewed and what travels seldom has travelled.
    """
    state = jax.eval_shape(algorithm.init, params)
    own = own_keys(config)
    every, renew_every = own.get("local_steps") or own.get("every") or 1, own.get("renew_every")
    every = 1 if own.get("stream") else every
    turns = math.lcm(own.get("first_every", 1), own.get("second_every", 1))  # exchanges, until all clocks begin anew
    num_steps = max(every * turns * math.ceil(8 / turns), renew_every or 0)
    # Between two exchanges nothing travels; but the reference may be renewed there, which no `every` foresees.
    sending = range(num_steps) if renew_every else range(every - 1, num_steps, every)

    def sent(step: int) -> float:
        def update(params, state):
            return algorithm.update(params, state, params, step)

        return wire_bytes(update, params, state, num_workers=config.num_workers)

    return sum(map(sent, sending)) / num_steps
