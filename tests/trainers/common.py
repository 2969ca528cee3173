"""What the programs train on, made in numpy, and how they save: orbax, one folder a step."""

import pathlib

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

PATTERNS = np.random.default_rng(1).normal(size=(10, 8, 8, 1))  # one for each of ten classes
NEXT = np.random.default_rng(2).permutation(32)  # which token follows which, in nine of ten cases
SAVE_EVERY = 4


def digits(seed, size=64):
    """Images [size, 8, 8, 1] and their classes [size]."""
    rng = np.random.default_rng(seed)
    label = rng.integers(10, size=size, dtype=np.int32)
    return {"image": (PATTERNS[label] + rng.normal(size=(size, 8, 8, 1))).astype(np.float32), "label": label}


def text(seed, size=64, length=8):
    """Tokens [size, length + 1]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(32, size=(size, length + 1), dtype=np.int32)
    for i in range(length):
        tokens[:, i + 1] = np.where(rng.random(size) < 0.9, NEXT[tokens[:, i]], tokens[:, i + 1])
    return tokens


def points(seed, size=64):
    """x [size, 2] and y [size, 1] of a smooth function."""
    x = np.random.default_rng(seed).uniform(-2, 2, size=(size, 2)).astype(np.float32)
    return x, 0.8 * x[:, :1] ** 2 + np.sin(x[:, 1:])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def latest_step(folder):
    return max((int(path.name) for path in pathlib.Path(folder).glob("[0-9]*")), default=0) if folder else 0


def restore_checkpoint(folder, state):
    """The newest one, in the shapes and places of `state`; without any, `state` itself."""
    if not (step := latest_step(folder)):
        return state
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(
            pathlib.Path(folder) / str(step), jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        )


def save_checkpoint(folder, state, step):
    if folder and step % SAVE_EVERY == 0:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(pathlib.Path(folder) / str(step), state)
