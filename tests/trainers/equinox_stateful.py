"""The shape of Equinox's stateful: BatchNorm over an axis of `vmap`, whose state goes through the step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new
from tests.trainers.common import points

n, workers, steps = 8, 8, 8


class Model(eqx.Module):
    body: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.body = eqx.nn.Linear(2, 32, use_bias=False, key=first)
        self.norm = eqx.nn.BatchNorm(32, axis_name="batch", mode="batch", momentum=0.5)
        self.head = eqx.nn.Linear(32, 1, key=second)

    def __call__(self, x, state):
        x, state = self.norm(self.body(x), state)
        return self.head(jax.nn.relu(x)), state


def compute_loss(model, state, xs, ys):
    batch_model = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    pred_ys, state = batch_model(xs, state)
    return jnp.mean((pred_ys - ys) ** 2), state


@eqx.filter_jit
def update(net, norms, opt_state, xs, ys):
    grads, norms = eqx.filter_grad(compute_loss, has_aux=True)(net, norms, xs, ys)
    # was: updates, opt_state = optim.update(grads, opt_state)
    updates, opt_state = optim.update(grads, opt_state, eqx.filter(net, eqx.is_inexact_array))
    return eqx.apply_updates(net, updates), norms, opt_state


def evaluate(net, norms):
    return float(compute_loss(eqx.nn.inference_mode(net), norms, *points(100))[0])


net, norms = eqx.nn.make_with_state(Model)(jax.random.key(0))
before = evaluate(net, norms)
# was: optim = optax.adam(1e-2)
optim = cj.as_optax(cj.crossover_sgd(optax.adam(1e-2), n))
opt_state = optim.init(eqx.filter(net, eqx.is_inexact_array))
arrays, norms, opt_state = cj.copies((eqx.filter(net, eqx.is_array), norms, opt_state), workers)  # new
# new
step = cj.per_worker(lambda m, *a: eqx.filter(update(eqx.combine(m, net), *a), eqx.is_array), workers, donate=(0, 1, 2))
for i in range(steps):
    # was: net, norms, opt_state = update(net, norms, opt_state, *points(i))
    arrays, norms, opt_state = step(arrays, norms, opt_state, *cj.split(points(i), workers))
net, norms = eqx.combine(cj.mean_over_workers((arrays, norms)), (net, norms))  # new
model, after = net, evaluate(net, norms)
