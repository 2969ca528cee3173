"""What a config may say: its values by name, what is wrong with them, and what must be alike on all processes."""

import difflib
import importlib.metadata
import inspect
import json
import operator
import re
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from crossover_jax.traced import trace_worker
from crossover_jax.wire import WIRES
from experiments import data, models, processes
from experiments.algorithms import ALGORITHMS, CUTS, POOLS
from experiments.configs import default
from experiments.optimizers import DECAYS, OPTIMIZERS

CHOICES = {"algorithm": ALGORITHMS, "optimizer": OPTIMIZERS, "schedule.decay": DECAYS}  # keys that choose a group
# Keys that only some configs read: whether this one does, and what would read it.
READERS: dict[str, tuple[Callable[[ml_collections.ConfigDict], bool], str]] = {
    "dataset.sequence": (lambda c: c.dataset.name == "text", "the data set 'text'"),
    "dataset.augment": (lambda c: c.dataset.name != "text", "data sets of images"),
    "checkpoint.keep": (lambda c: c.checkpoint.every is not None, "a run with `config.checkpoint.every`"),
    "max_rollbacks": (lambda c: c.on_nan == "rollback", "a run with --config.on_nan=rollback"),
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


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A config's values by dotted names, as JSON gives them back.

    >>> as_json(ml_collections.ConfigDict({"model": {"options": {"hidden": (32,)}}}))
    {'model.options.hidden': [32]}
    """
    return json.loads(json.dumps(flat_settings(config)))


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint recorded of its config, and of keys that came later their defaults, by which it was trained.

    >>> completed({"seed": 3})["seed"], completed({"seed": 3})["period"]
    (3, 1)
    """
    return {**as_json(default.get_config()), **recorded}


def config_of(recorded: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config that `as_json` told, with the defaults of keys that came later.

    >>> config = config_of({"seed": 3, "model.options.hidden": [32]})
    >>> config.seed, config.model.options.hidden, config.num_workers
    (3, [32], 8)
    """
    nested: dict[str, Any] = {"model": {"options": {}}}  # a folder without keys has left no trace
    for name, value in completed(recorded).items():
        *folders, key = name.split(".")
        reduce(lambda folder, name: folder.setdefault(name, {}), folders, nested)[key] = value
    return ml_collections.ConfigDict(nested)


# What is wrong


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Raise `ValueError` for the first setting that is wrong whatever the data and the machine."""
    _check_names(config)
    for key, (holds, requirement) in _requirements(config).items():
        if not holds:
            raise ValueError(f"`config.{key}` must be {requirement}, got {operator.attrgetter(key)(config)!r}.")
    _check_foreign(config)
    _check_options(config)


def require_known(key: str, name: str, names: Iterable[str]) -> None:
    """Raise `ValueError` with the near miss if `name`, the value of `key`, is not one of `names`."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"`{key}` must be one of {', '.join(names)}, got {name!r}{hint}")


def _check_names(config: ml_collections.ConfigDict) -> None:
    known: dict[str, Iterable[str]] = {"dataset.name": data.DATASETS, "model.name": models.MODELS, **CHOICES}
    known |= {"crossover.pool": POOLS, "crossover.cut": CUTS, "outer.mix": ("crossover", "average")}
    wires = ("crossover.wire", "outer.wire", "des_loc.wire")
    known |= {key: WIRES for key in wires if operator.attrgetter(key)(config) is not None}
    for key, names in known.items():
        require_known(f"config.{key}", operator.attrgetter(key)(config), names)


def _requirements(config: ml_collections.ConfigDict) -> dict[str, tuple[bool, str]]:
    """Of each key whether it holds, and what must hold."""
    schedule = config.schedule
    at_least_1 = (
        *("num_workers", "batch_size", "period", "micro_batches", "log_every", "eval_batch_size", "checkpoint.keep"),
        *("crossover.local_steps", "crossover.rounds", "local_sgd.local_steps", "sgp.peers"),
        *("crossover_paper.pool_size", "outer.every", "outer.rounds", "inner.fsdp", "inner.tensor"),
        *("noloco.every", "noloco.pool_size", "des_loc.every", "des_loc.first_every", "des_loc.second_every"),
        "des_loc.rounds",
    )
    none_or_at_least_1 = (
        *("steps", "checkpoint.every", "crossover.pool_size", "crossover.segments", "crossover.in_flight"),
        *("crossover.momentum_rounds", "crossover.renew_every", "crossover_paper.segments"),
    )
    flat = flat_settings(config)
    tail = schedule.polynomial.tail
    return {
        **{key: (flat[key] >= 1, "at least 1") for key in at_least_1},
        **{key: (flat[key] is None or flat[key] >= 1, "None or at least 1") for key in none_or_at_least_1},
        "simulate": (config.simulate in ("auto", "yes", "no"), "'auto', 'yes' or 'no'"),
        "epochs": (config.steps is not None or config.epochs > 0, "positive where `config.steps` is None"),
        "eval_every": (config.eval_every > 0, "positive"),
        "on_nan": (config.on_nan in ("stop", "rollback"), "'stop' or 'rollback'"),
        "max_rollbacks": (config.max_rollbacks >= 0, "at least 0"),
        "schedule.warmup": (0 <= schedule.warmup <= 1, "from 0 to 1"),
        "schedule.cosine.end": (0 <= schedule.cosine.end <= 1, "from 0 to 1"),
        "schedule.polynomial.tail": (0 <= tail <= 1 - schedule.warmup, "from 0 to 1 minus the warm-up"),
        "optimizer": (
            (config.algorithm, config.optimizer) != ("allreduce", "gossip_adamw"),
            "another, such as 'adamw', with --config.algorithm=allreduce, whose optimizer sees the average gradient",
        ),
        "clip_norm": (config.clip_norm is None or config.clip_norm > 0, "None or positive"),
        "label_smoothing": (0 <= config.label_smoothing < 1, "at least 0 and below 1"),
    } | (
        {"checkpoint.every": (config.checkpoint.every is not None, "a number with --config.on_nan=rollback")}
        if config.on_nan == "rollback"
        else {}
    )


def _check_foreign(config: ml_collections.ConfigDict) -> None:
    """Raise `ValueError` for a key that this config does not read and that was changed all the same."""
    now, unchanged = flat_settings(config), flat_settings(default.get_config())
    for key, names in CHOICES.items():
        chosen = now[key]
        folder = key.rpartition(".")[0]
        groups = {name: f"{folder}.{name}." if folder else f"{name}." for name in names if name != chosen}
        for name, group in groups.items():
            for own in (own for own in unchanged if own.startswith(group)):
                if now[own] != unchanged[own]:
                    raise ValueError(
                        f"`config.{own}` must stay {unchanged[own]!r} where `config.{key}` is {chosen!r}, which does "
                        f"not read it, got {now[own]!r}: leave it out, or pass --config.{key}={name}."
                    )
    for own, (reads, reader) in READERS.items():
        if now[own] != unchanged[own] and not reads(config):
            raise ValueError(
                f"`config.{own}` must stay {unchanged[own]!r} here, got {now[own]!r}: only {reader} would read it."
            )


def _check_options(config: ml_collections.ConfigDict) -> None:
    taken = inspect.signature(models.MODELS[config.model.name]).parameters
    options = [name for name in taken if name not in ("depth", "num_classes", "image_shape", "rngs")]
    if unknown := [name for name in config.model.options if name not in options]:
        raise ValueError(
            f"`config.model.options` must be among {', '.join(options)} for {config.model.name}, got "
            f"{', '.join(unknown)}; --config.model.options={{}} leaves all at their defaults."
        )


# What must be alike


def run_identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
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


def fingerprint(config: ml_collections.ConfigDict, program: Any, *datasets: data.Dataset) -> dict[str, Any]:
    """Digests of what the settings become: a numpy of another version may draw other permutations from one seed."""
    exchange, table = exchange_digests(program, config.num_workers)
    return {
        "pool and cut": exchange,
        "table": table,
        "data": ", ".join(dataset.digest for dataset in datasets),
    }


def exchange_digests(program: Any, num_workers: int) -> tuple[str, str]:
    """Digests of the traced exchange (permutations, shares, segments) and of the arrays it reads (the table)."""
    state, step = program.shapes, jax.ShapeDtypeStruct((), jnp.int32)

    def update(state, step):
        return program.algorithm.update(state.params, state.algorithm, state.params, step)

    traced = trace_worker(update, state, step, axes={"worker": num_workers})
    text = re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))  # addresses of functions
    return processes.digest(text.encode()), processes.digest(*(np.asarray(x) for x in traced.consts))
