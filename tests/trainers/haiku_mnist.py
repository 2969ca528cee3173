"""The shape of dm-haiku's examples/mnist, `init` and `apply` by hand: a NamedTuple of state, averaged parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, digits

n, workers, steps = 8, 8, 8


class TrainingState(NamedTuple):
    params: optax.Params
    avg_params: optax.Params
    opt_state: optax.OptState


def init(rng):
    first, second = jax.random.split(rng)
    return {
        "linear": {"w": jax.random.normal(first, (64, 32)) / 8, "b": jnp.zeros(32)},
        "linear_1": {"w": jax.random.normal(second, (32, 10)) / 6, "b": jnp.zeros(10)},
    }


def apply(params, images):
    x = images.reshape(len(images), -1)
    x = jax.nn.relu(x @ params["linear"]["w"] + params["linear"]["b"])
    return x @ params["linear_1"]["w"] + params["linear_1"]["b"]


def loss_of(params, batch):
    return cross_entropy(apply(params, batch["image"]), batch["label"])


# was: optimiser = optax.adam(1e-2)
optimiser = cj.as_optax(cj.crossover_sgd(optax.adam(1e-2), n))


# was: @jax.jit
@lambda step: cj.per_worker(step, workers)
def step(state, batch):
    grads = jax.grad(loss_of)(state.params, batch)
    # was: updates, opt_state = optimiser.update(grads, state.opt_state)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    avg_params = optax.incremental_update(params, state.avg_params, step_size=0.5)
    return TrainingState(params, avg_params, opt_state)


params = init(jax.random.key(0))
before = float(loss_of(params, digits(100, 256)))
state = TrainingState(params, params, optimiser.init(params))
state = cj.copies(state, workers)  # new
for i in range(steps):
    # was: state = step(state, digits(i))
    state = step(state, cj.split(digits(i), workers))
# was: model = state.avg_params
model = cj.mean_over_workers(state.avg_params)
after = float(loss_of(model, digits(100, 256)))
