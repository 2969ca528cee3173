"""The shape of Equinox's mnist: a list of layers in which functions are leaves, and `filter_jit`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, digits

n, workers, steps = 8, 8, 8


class CNN(eqx.Module):
    layers: list

    def __init__(self, key):
        first, second = jax.random.split(key)
        conv, head = eqx.nn.Conv2d(1, 4, 3, stride=2, key=first), eqx.nn.Linear(36, 10, key=second)
        self.layers = [conv, jax.nn.relu, jnp.ravel, head]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def loss_of(net, x, y):
    return cross_entropy(jax.vmap(net)(x), y)


def batch_of(seed, size=64):
    batch = digits(seed, size)
    return batch["image"].transpose(0, 3, 1, 2), batch["label"]


@eqx.filter_jit
def make_step(net, opt_state, x, y):
    loss, grads = eqx.filter_value_and_grad(loss_of)(net, x, y)
    updates, opt_state = optim.update(grads, opt_state, eqx.filter(net, eqx.is_array))
    return eqx.apply_updates(net, updates), opt_state, loss


net = CNN(jax.random.key(0))
before = float(loss_of(net, *batch_of(100, 256)))
# was: optim = optax.adamw(1e-2)
optim = cj.as_optax(cj.crossover_sgd(optax.adamw(1e-2), n))
opt_state = optim.init(eqx.filter(net, eqx.is_array))
arrays, opt_state = cj.copies((eqx.filter(net, eqx.is_array), opt_state), workers)  # new
# new
step = cj.per_worker(lambda m, *a: eqx.filter(make_step(eqx.combine(m, net), *a), eqx.is_array), workers, donate=(0, 1))
for i in range(steps):
    # was: net, opt_state, loss = make_step(net, opt_state, *batch_of(i))
    arrays, opt_state, loss = step(arrays, opt_state, *cj.split(batch_of(i), workers))
net = eqx.combine(cj.mean_over_workers(arrays), net)  # new
model, after = net, float(loss_of(net, *batch_of(100, 256)))
