"""From a config to what is run: mesh, model, algorithm, step, placements, and what must be alike on all processes."""

import importlib.metadata
import inspect
import math
import operator
import re
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
from crossover_jax.compiled import wire_bytes
from crossover_jax.cuts import Cut, flatten
from experiments import data, models, processes
from experiments.algorithms import ALGORITHMS, make_algorithm, make_cut, make_optimizer, require_known
from experiments.evaluate import batch_axes
from experiments.step import TrainState, init_state, make_train_step

PyTree = Any


class Program(NamedTuple):
    """What a config, a data set's shapes and a mesh make: shared by training and by the preflight."""

    algorithm: cj.Algorithm
    apply: Callable
    leaves: list[str]  # of a gradient: its parameters by name, with the segments they are in
    init: Callable[[], TrainState]  # one worker's first state
    shapes: TrainState  # of one worker's state
    specs: TrainState | None  # how it lies inside a worker; None where workers are simulated
    step: jax.stages.Wrapped  # all workers' (state, batch, step) -> (state, metrics)
    batch_part: Callable[[tuple[int, int]], tuple[slice, slice]]  # of [workers, per worker], this process's
    place_batch: Callable[[PyTree], PyTree]
    place_step: Callable[[int], jax.Array]

    def predict(self, params: PyTree, model_state: PyTree, image: jax.Array) -> jax.Array:
        """Logits, as in evaluation."""
        return self.apply(params, model_state, image, train=False)[0]


def make_program(
    config: ml_collections.ConfigDict,
    dataset: data.Dataset,
    where: Mesh | int,
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
    of_params = None if isinstance(where, int) else param_specs(config, where, graphdef, params, model_state)
    optimizer = make_optimizer(config.optimizer, num_steps, learning_rate)
    algorithm = make_algorithm(config.algorithm, optimizer, config.num_workers, params, of_params)
    shapes = jax.eval_shape(partial(init_state, algorithm=algorithm), params, model_state)
    specs = None
    if of_params is not None:
        specs = TrainState(of_params, P(), cj.state_specs(shapes.algorithm, params, of_params))
    apply = make_apply(graphdef, dataset)
    loss = partial(loss_fn, apply, label_smoothing=config.label_smoothing)
    step = make_train_step(loss, algorithm, where, seed=seed, micro_batches=config.micro_batches, specs=specs)
    cut = make_cut(config.algorithm, config.num_workers, params)
    if cut is not None and cut.is_equal and not isinstance(where, int) and where.size > config.num_workers:
        cut = None  # each device cuts its own part
    leaves = describe_leaves(params, cut)

    def init() -> TrainState:
        return init_state(*build(), algorithm)

    return Program(algorithm, apply, leaves, init, shapes, specs, step, *placements(where))


def describe_leaves(params: PyTree, cut: Cut | None) -> list[str]:
    """The parameters by name, each with the segments it is in.

    >>> describe_leaves({"b": np.zeros(2), "w": np.zeros(4)}, cj.by_size(3))
    ['b (segment 0 of 3)', 'w (segments 1 to 2 of 3)']
    """
    names, leaves, _ = flatten(params)
    if cut is None:
        return names
    for packing in cut.packings(names, leaves):
        ends = np.cumsum([math.prod(leaves[i].shape) for i in packing.leaves])
        for i, end in zip(packing.leaves, ends, strict=True):
            inside = [end - math.prod(leaves[i].shape), max(end - 1, 0)]
            first, last = np.searchsorted(packing.bounds[1:-1], inside, side="right")
            which = f"segment {first}" if first == last else f"segments {first} to {last}"
            names[i] += f" ({which} of {cut.num_segments})"
        for i, *_ in packing.split:
            names[i] += f" (a part in each of {cut.num_segments} segments)"
    return names


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
    """How many steps a run has: `config.steps`, or those of `config.epochs`."""
    return config.steps or max(1, round(config.epochs * (len(dataset) / config.batch_size)))


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


def settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Config, code and versions, by the names a person would look for; data may lie elsewhere on every host."""
    own = {f"config.{key}": value for key, value in flat_settings(config).items() if key != "dataset.data_dir"}
    return {**own, **versions()}


def versions() -> dict[str, str]:
    """Of the code and of what computes."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    return {"code": processes.code_version(), **{name: importlib.metadata.version(name) for name in names}}


def device_counts() -> str:
    """How many devices each process has, and of which kind.

    >>> device_counts()
    '64 cpu'
    """
    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    return f"{', '.join(map(str, counts))} {jax.devices()[0].platform}"


def fingerprint(config: ml_collections.ConfigDict, program: Program, *datasets: data.Dataset) -> dict[str, Any]:
    """What the settings made: a numpy of another version may draw other permutations from the same seed."""
    exchange, table = exchange_digests(program, config.num_workers)
    return {
        "pool and cut": exchange,
        "table": table,
        "data": ", ".join(dataset.digest for dataset in datasets),
    }


def flat_settings(config: ml_collections.ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted names.

    >>> flat_settings({"seed": 0, "model": {"name": "mlp"}})
    {'seed': 0, 'model.name': 'mlp'}
    """
    found = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, ml_collections.ConfigDict | dict)
        found |= flat_settings(value, f"{name}.") if nested else {name: value}
    return found


def exchange_digests(program: Program, num_workers: int) -> tuple[str, str]:
    """Digests of the traced exchange (permutations, shares, segments) and of the arrays it reads (the table)."""
    state, step = program.shapes, jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.make_jaxpr(
        lambda s, t: program.algorithm.update(s.params, s.algorithm, s.params, t), axis_env=[("worker", num_workers)]
    )(state, step)
    text = re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))  # addresses of functions
    return processes.digest(text.encode()), processes.digest(*(np.asarray(x) for x in traced.consts))


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Raise `ValueError` for the first setting that is wrong whatever the data and the machine."""
    must = {
        "simulate": (config.simulate in ("auto", "yes", "no"), "'auto', 'yes' or 'no'"),
        "num_workers": (config.num_workers >= 1, "at least 1"),
        "batch_size": (config.batch_size >= 1, "at least 1"),
        "micro_batches": (config.micro_batches >= 1, "at least 1"),
        "steps": (config.steps >= 0, "at least 0"),
        "epochs": (config.steps > 0 or config.epochs > 0, "positive where `config.steps` is 0"),
        "log_every": (config.log_every >= 1, "at least 1"),
        "eval_every": (config.eval_every > 0, "positive"),
        "eval_batch_size": (config.eval_batch_size >= 1, "at least 1"),
        "algorithm.rounds": (config.algorithm.rounds >= 1, "at least 1"),
        "algorithm.local_steps": (config.algorithm.local_steps >= 1, "at least 1"),
        "algorithm.in_flight": (config.algorithm.in_flight >= 0, "at least 0"),
        "algorithm.renew": (config.algorithm.renew >= 0, "at least 0"),
        "checkpoint.every": (config.checkpoint.every >= 0, "at least 0"),
        "checkpoint.keep": (config.checkpoint.keep >= 1, "at least 1"),
        "on_nan": (config.on_nan in ("stop", "rollback"), "'stop' or 'rollback'"),
        "max_rollbacks": (config.max_rollbacks >= 0, "at least 0"),
        "optimizer.warmup": (0 <= config.optimizer.warmup <= 1, "from 0 to 1"),
        "optimizer.tail": (0 <= config.optimizer.tail <= 1 - config.optimizer.warmup, "from 0 to 1 less the warm-up"),
        "label_smoothing": (0 <= config.label_smoothing < 1, "from 0 to less than 1"),
        "inner.fsdp": (config.inner.fsdp >= 1, "at least 1"),
        "inner.tensor": (config.inner.tensor >= 1, "at least 1"),
    }
    for key, (holds, requirement) in must.items():
        if not holds:
            raise ValueError(f"`config.{key}` must be {requirement}, got {operator.attrgetter(key)(config)!r}.")
    require_known("config.dataset.name", config.dataset.name, data.DATASETS)
    require_known("config.model.name", config.model.name, models.MODELS)
    require_known("config.algorithm.name", config.algorithm.name, ALGORITHMS)
    taken = inspect.signature(models.MODELS[config.model.name]).parameters
    options = [name for name in taken if name not in ("depth", "num_classes", "image_shape", "rngs")]
    if unknown := [name for name in config.model.options if name not in options]:
        raise ValueError(
            f"`config.model.options` must be among {', '.join(options)} for {config.model.name}, got "
            f"{', '.join(unknown)}; --config.model.options={{}} leaves all at their defaults."
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


def placements(where: Mesh | int) -> tuple[Callable, Callable, Callable]:
    """Which part of `[workers, per worker]` this process reads, and what puts a batch and the step in place."""
    if isinstance(where, int):
        return (
            lambda shape: (slice(0, shape[0]), slice(0, shape[1])),
            jax.device_put,
            lambda t: jax.device_put(np.int32(t)),
        )
    spec, everywhere = P(batch_axes(where)), NamedSharding(where, P())
    return (
        partial(cj.local_part, where=where, spec=spec),
        partial(cj.from_local, where=where, spec=spec),
        lambda t: processes.place(np.int32(t), everywhere),
    )


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

    Over eight of them, or until a reference is renewed.
    """
    state = jax.eval_shape(algorithm.init, params)
    num_steps = max(8 * config.algorithm.local_steps, config.algorithm.renew)

    def sent(step: int) -> float:
        def update(params, state):
            return algorithm.update(params, state, params, step)

        return wire_bytes(update, params, state, num_workers=config.num_workers)

    return sum(map(sent, range(num_steps))) / num_steps
