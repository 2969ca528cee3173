"""The shape of flax's optimization cookbook: `wrt=nnx.LoRAParam` trains adapters, and beside them a moving average."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import crossover_jax as cj  # new
from tests.trainers.common import points

n, workers, steps = 8, 8, 8


class Ema(nnx.Module):
    def __init__(self, model, decay=0.5):
        self.decay = decay
        self.model = jax.tree.map(jnp.copy, model)

    def update(self, model):
        self.model = jax.tree.map(lambda old, new: self.decay * old + (1 - self.decay) * new, self.model, model)


def adapted(din, dout, rngs):
    return nnx.LoRA(din, 4, dout, base_module=nnx.Linear(din, dout, rngs=rngs), rngs=rngs)


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, ema, x, y):
    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x, y)
    optimizer.update(model, grads)
    ema.update(model)
    return loss


rngs = nnx.Rngs(0)
model = nnx.Sequential(adapted(2, 16, rngs), nnx.tanh, adapted(16, 1, rngs))
ema = Ema(model)
before = float(loss_fn(model, *points(100)))
tx = optax.adam(2e-2)
# was: optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
state = cj.copies((model, nnx.Optimizer(model, cj.as_optax(cj.crossover_sgd(tx, n)), wrt=nnx.LoRAParam), ema), workers)
step = cj.per_worker(cj.in_place(train_step), workers)  # new
for i in range(steps):
    # was: loss = train_step(model, optimizer, ema, *points(i))
    state, loss = step(state, *cj.split(points(i), workers))
model, _, ema = cj.mean_over_workers(state)  # new
after = float(loss_fn(ema.model, *points(100)))
