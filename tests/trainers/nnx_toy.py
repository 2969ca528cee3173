"""The shape of flax's nnx_toy_examples/04_data_parallel_with_jit: shardings say where state and batches lie."""

# gone: import jax
import jax.numpy as jnp
import optax
from flax import nnx

import crossover_jax as cj  # new
from tests.trainers.common import points

n, workers, steps = 8, 8, 8
# gone: mesh = jax.sharding.Mesh(jax.devices()[:n], ("data",))
# gone: model_sharding, data_sharding = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(2, 32, rngs=rngs)
        self.head = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


model = MLP(nnx.Rngs(0))
before = float(loss_fn(model, *points(100)))
tx = optax.adamw(1e-2)
# was: optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
state = cj.copies((model, nnx.Optimizer(model, cj.as_optax(cj.crossover_sgd(tx, n)), wrt=nnx.Param)), workers)
# gone: nnx.update((model, optimizer), jax.device_put(nnx.state((model, optimizer)), model_sharding))
step = cj.per_worker(cj.in_place(train_step), workers)  # new
for i in range(steps):
    x, y = points(i)
    # gone: x, y = jax.device_put((x, y), data_sharding)
    # was: loss = train_step(model, optimizer, x, y)
    state, loss = step(state, *cj.split((x, y), workers))
# was: nnx.update((model, optimizer), jax.device_get(nnx.state((model, optimizer))))
model, _ = cj.mean_over_workers(state)
after = float(loss_fn(model, *points(100)))
