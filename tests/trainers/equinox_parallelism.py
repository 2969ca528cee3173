"""The shape of Equinox's parallelism: `filter_shard` replicates the model and deals out the batch, all is donated."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new
from tests.trainers.common import points

n, workers, steps = 8, 8, 8
# gone: mesh = jax.sharding.Mesh(jax.devices()[:n], ("batch",))
# gone: data_sharding, model_sharding = jax.NamedSharding(mesh, jax.P("batch")), jax.NamedSharding(mesh, jax.P())


def compute_loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


# gone: @eqx.filter_jit(donate="all")
def train_step(model, opt_state, x, y):
    # gone: model, opt_state = eqx.filter_shard((model, opt_state), model_sharding)
    # gone: x, y = eqx.filter_shard((x, y), data_sharding)
    grads = eqx.filter_grad(compute_loss)(model, x, y)
    # was: updates, opt_state = optim.update(grads, opt_state)
    updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    model = eqx.apply_updates(model, updates)
    # was: return eqx.filter_shard((model, opt_state), model_sharding)
    return eqx.filter((model, opt_state), eqx.is_array)


model = eqx.nn.MLP(2, 1, 32, depth=1, key=jax.random.key(0))
before = float(compute_loss(model, *points(100)))
# was: optim = optax.adam(1e-2)
optim = cj.as_optax(cj.crossover_sgd(optax.adam(1e-2), n))
opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
# was: model, opt_state = eqx.filter_shard((model, opt_state), model_sharding)
arrays, opt_state = cj.copies((eqx.filter(model, eqx.is_array), opt_state), workers)
step = cj.per_worker(lambda m, *rest: train_step(eqx.combine(m, model), *rest), workers, donate=(0, 1))  # new
for i in range(steps):
    x, y = points(i)
    # gone: x, y = eqx.filter_shard((x, y), data_sharding)
    # was: model, opt_state = train_step(model, opt_state, x, y)
    arrays, opt_state = step(arrays, opt_state, *cj.split((x, y), workers))
model = eqx.combine(cj.mean_over_workers(arrays), model)  # new
after = float(compute_loss(model, *points(100)))
