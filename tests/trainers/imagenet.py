"""The shape of flax's examples/imagenet: linen, `pmap` over "batch", BatchNorm, checkpoints, resume."""

from typing import Any

import jax
import optax

# gone: from flax import jax_utils
from flax import linen as nn
from flax.training import train_state
from jax import lax

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, digits, restore_checkpoint, save_checkpoint

n, workers, steps, folder = 8, 8, 8, None


class TrainState(train_state.TrainState):
    batch_stats: Any


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def create_train_state(net):
    tx = optax.sgd(optax.cosine_decay_schedule(0.05, 20), momentum=0.9, nesterov=True)
    tx = cj.as_optax(cj.crossover_sgd(tx, n))  # new
    return TrainState.create(apply_fn=net.apply, tx=tx, **net.init(jax.random.key(0), digits(0)["image"]))


def train_step(state, batch):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, changed = state.apply_fn(variables, batch["image"], mutable=["batch_stats"])
        return cross_entropy(logits, batch["label"]), changed

    (loss, changed), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    # gone: grads = lax.pmean(grads, "batch")
    return state.apply_gradients(grads=grads, **changed), lax.pmean({"loss": loss}, "batch")


def evaluate(state):
    test = digits(100, 256)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return float(cross_entropy(state.apply_fn(variables, test["image"], train=False), test["label"]))


state = create_train_state(ResNet())
before = evaluate(state)
state = cj.copies(state, workers, axis="batch")  # new
state = restore_checkpoint(folder, state)
# was: start = int(state.step)
start = int(state.step[0])
# gone: state = jax_utils.replicate(state, jax.local_devices()[:n])
# was: step = jax.pmap(train_step, axis_name="batch", donate_argnums=0)
step = cj.per_worker(train_step, workers, axis="batch")
for i in range(start, steps):
    batch = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), digits(i))
    state, metrics = step(state, batch)
    saved = state
    # gone: saved = jax.tree.map(lambda x: x[0], state)
    save_checkpoint(folder, saved, i + 1)
# was: mean = jax.tree.map(lambda x: x[0], state)
mean = cj.mean_over_workers(state)
model, after = mean.params, evaluate(mean)
