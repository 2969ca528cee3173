"""The shape of flax's optimization cookbook, its L-BFGS: the line search takes values and gradients as keywords."""

import jax.numpy as jnp
import optax
from flax import nnx

import crossover_jax as cj  # new
from tests.trainers.common import points

n, workers, steps = 8, 8, 8


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, x, y):
    graphdef = nnx.graphdef(model)
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    value_fn = lambda state: loss_fn(nnx.merge(graphdef, state), x, y)
    optimizer.update(model, grads, grad=grads, value=loss, value_fn=value_fn)
    return loss


model = nnx.Linear(2, 8, rngs=nnx.Rngs(0))
before = float(loss_fn(model, *points(100)))
tx = optax.lbfgs(0.05, memory_size=2, linesearch=optax.scale_by_backtracking_linesearch(5, store_grad=True))
# was: optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
state = cj.copies((model, nnx.Optimizer(model, cj.as_optax(cj.crossover_sgd(tx, n)), wrt=nnx.Param)), workers)
step = cj.per_worker(cj.in_place(train_step), workers)  # new
for _ in range(steps):
    # was: loss = train_step(model, optimizer, *points(0))
    state, loss = step(state, *cj.split(points(0), workers))
model, _ = cj.mean_over_workers(state)  # new
after = float(loss_fn(model, *points(100)))
