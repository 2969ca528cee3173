"""What all contenders of a race have in common, by numpy alone: model, data, batches, learning rates.

A task is files in a folder that `experiments.data` fills, so that a host of PyTorch imports no JAX. A model is a dict
of arrays by name; its vector is all of them, one behind the other.
"""

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

PARTS = ("train", "validation", "test")
BATCH = 256  # examples of all hosts together
HELD_OUT = 10_000  # of the images, for tuning


class Task(NamedTuple):
    """A model, and the level that a race is to."""

    sizes: Mapping[str, int]  # of the model
    optimizer: str  # "sgd", momentum 0.9; or "adamw", b2 0.99, weight decay 0.1
    batch: int  # examples of all hosts together
    steps: int  # of a run, which the schedule ends with
    every: int  # steps between two evaluations
    rates: tuple[float, ...]  # learning rates among which each contender is tuned
    level: float
    is_loss: bool  # bits per byte, where less is better, and not accuracy


TASKS = {
    "images": Task({"in": 784, "hidden": 256, "out": 10}, "sgd", BATCH, 1500, 20, (0.025, 0.05, 0.1), 0.88, False),
    "text": Task(
        {"vocabulary": 256, "width": 64, "layers": 2, "heads": 4, "mlp": 224, "sequence": 64},
        *("adamw", 64, 800, 20, (0.008, 0.016, 0.032), 2.3, True),
    ),
}
PEERS = ("local", "ddp", "decent", "post_local", "diloco")  # run by PyTorch
WARMUP, LAST = 0.1, 0.1  # part of the steps, part of the highest rate


def rate_at(step: int, task: Task, highest: float) -> float:
    """The learning rate of a step: up along a line, down along half of a cosine.

    >>> [round(rate_at(t, TASKS["images"], 0.1), 3) for t in (0, 74, 149, 1499)]
    [0.001, 0.05, 0.1, 0.01]
    """
    up = WARMUP * task.steps
    if step < up:
        return highest * (step + 1) / up
    done = (step - up) / (task.steps - up)
    return highest * (LAST + (1 - LAST) * (1 + math.cos(math.pi * done)) / 2)


def is_peer(contender: str) -> bool:
    return contender.split("/")[0] in PEERS


def period_of(contender: str) -> int:
    """Steps between two exchanges.

    >>> [period_of(text) for text in ("ddp", "outer/16/int8", "streamed/16", "post_local/64/0")]
    [1, 16, 1, 64]
    """
    return int(contender.split("/")[1]) if contender.startswith(("outer/", "post_local/", "diloco/")) else 1


def shapes(task: Task) -> dict[str, tuple[int, ...]]:
    """The model's parameters by name: a perceptron of one hidden layer, or a decoder."""
    n = task.sizes
    if "hidden" in n:
        return {
            **{"layer0/kernel": (n["in"], n["hidden"]), "layer0/bias": (n["hidden"],)},
            **{"layer1/kernel": (n["hidden"], n["out"]), "layer1/bias": (n["out"],)},
        }
    width, found = n["width"], {"embedding": (n["vocabulary"], n["width"])}
    for i in range(n["layers"]):
        found |= {f"layer{i}/{name}": (width,) for name in ("before_attention", "before_mlp")}
        found |= {f"layer{i}/{name}": (width, width) for name in ("query", "key", "value", "out")}
        found |= {f"layer{i}/{name}": (width, n["mlp"]) for name in ("gate", "up")}
        found |= {f"layer{i}/down": (n["mlp"], width)}
    return {**found, "norm": (width,), "head": (width, n["vocabulary"])}


def first_values(task: Task, seed: int) -> dict[str, np.ndarray]:
    """Matrices normal with a variance of 1 / (fan in), twice that before a ReLU; norms 1, biases 0."""
    rng, found = np.random.default_rng([seed, 0]), {}
    for name, shape in shapes(task).items():
        last = name.rsplit("/", 1)[-1]
        if len(shape) == 1:
            found[name] = np.full(shape, float(last != "bias"), np.float32)
            continue
        variance = 1.0 if name == "embedding" else 1 / shape[0]
        if "hidden" in task.sizes:
            variance *= 2
        elif last in ("out", "down"):  # they write into the residual stream
            variance /= 2 * task.sizes["layers"]
        found[name] = (rng.standard_normal(shape) * math.sqrt(variance)).astype(np.float32)
    return found


def as_vector(params: Mapping[str, Any], task: Task) -> np.ndarray:
    return np.concatenate([np.asarray(params[name], np.float32).ravel() for name in shapes(task)])


def as_params(vector: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    found, at = {}, 0
    for name, shape in shapes(task).items():
        found[name] = vector[at : at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)
    return found


def num_params(task: Task) -> int:
    return sum(map(math.prod, shapes(task).values()))


class Examples(NamedTuple):
    inputs: np.ndarray  # float32 pixels [examples, 784], or bytes [examples, sequence]
    labels: np.ndarray  # int64


def read(folder: pathlib.Path, name: str, part: str) -> Examples:
    """Mapped into memory: hosts on one machine share it."""
    return Examples(*(np.load(folder / f"{name}-{part}-{what}.npy", mmap_mode="r") for what in Examples._fields))


def batch_of(examples: Examples, task: Task, seed: int, step: int, hosts: range, num_hosts: int) -> Examples:
    """The parts of some hosts of a step's batch, `[hosts, examples of each, ...]`; each epoch in its own order."""
    of_epoch = len(examples.labels) // task.batch
    order = _order(seed, step // of_epoch, len(examples.labels))
    each, first = task.batch // num_hosts, step % of_epoch * task.batch
    at = order[first : first + each * num_hosts].reshape(num_hosts, each)[hosts.start : hosts.stop]
    return Examples(examples.inputs[at], examples.labels[at])


@functools.lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def prepare(folder: pathlib.Path, name: str, data_dir: str) -> None:
    """Write the files of a task that are not there; images come from `data_dir`, text from Python's own library."""
    if all((folder / f"{name}-{part}-labels.npy").exists() for part in PARTS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part, examples in (_images(data_dir) if name == "images" else _text(TASKS[name].sizes["sequence"])).items():
        for what, array in examples._asdict().items():  # labels last: with them a part is whole
            np.save(folder / f"{name}-{part}-{what}.npy", array)


def _images(data_dir: str) -> dict[str, Examples]:
    from experiments import data

    def split(part: str) -> Examples:
        found = data.load("fashion_mnist", part, data_dir=data_dir)
        images, labels = data.eval_arrays(found)
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255
        return Examples((pixels - np.float32(found.mean[0])) / np.float32(found.std[0]), labels.astype(np.int64))

    whole, test = split("train"), split("test")
    train, held_out = (Examples(*(x[at] for x in whole)) for at in (slice(HELD_OUT, None), slice(HELD_OUT)))
    return {"train": train, "validation": held_out, "test": test}


def _text(sequence: int) -> dict[str, Examples]:
    import sysconfig

    from experiments.data import text

    found = text.splits(f"{sysconfig.get_path('stdlib')}/*.py", sequence)
    # What is evaluated is every eighth window: all of them would take longer than training.
    return {part: Examples(*(x[:: 1 if part == "train" else 8] for x in found[part])) for part in PARTS}
