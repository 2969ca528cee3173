"""The shape of big_vision's train.py: a dict of state, `jit` with out_shardings, logical axes, momentum in bfloat16."""

from functools import partial

import jax
import optax
from flax import linen as nn

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, digits, latest_step, restore_checkpoint, save_checkpoint

n, workers, steps, folder = 8, 8, 8, None
RULES = (("act_batch", "data"),)
# gone: mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
# gone: replicated, by_batch = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Conv(16, (4, 4), strides=4)(image).reshape(len(image), -1, 16)
        x = nn.with_logical_constraint(x, ("act_batch", None, None))
        x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x.reshape(len(x), -1)))


def loss_of(params, batch, **options):
    return cross_entropy(net.apply({"params": params}, batch["image"], **options), batch["label"])


# was: @partial(jax.jit, donate_argnums=(0,), out_shardings=(replicated, replicated))
@partial(cj.per_worker, workers=workers, replicated=("rng",))
def step(train_state, rng, batch):
    params, opt = train_state["params"], train_state["opt"]
    count = optax.tree.get_all_with_path(opt, "count")[0][1]
    rngs = {"dropout": jax.random.fold_in(rng, count)}
    loss, grads = jax.value_and_grad(loss_of)(params, batch, train=True, rngs=rngs)
    updates, opt = tx.update(grads, opt, params)
    params = optax.apply_updates(params, updates)
    return {"params": params, "opt": opt}, {"training_loss": loss, "l2_grads": optax.tree.norm(grads)}


net, rng = ViT(), jax.random.key(1)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, mu_dtype="bfloat16"))
tx = cj.as_optax(cj.crossover_sgd(tx, n))  # new
params = net.init(jax.random.key(0), digits(0)["image"])["params"]
before = float(loss_of(params, digits(100, 256)))
state = {"params": params, "opt": tx.init(params)}
# was: state = jax.device_put(state, replicated)
state = cj.copies(state, workers)
state = restore_checkpoint(folder, state)
for i in range(latest_step(folder), steps):
    # was: batch = jax.device_put(digits(i), by_batch)
    batch = cj.split(digits(i), workers)
    with jax.transfer_guard_host_to_device("disallow"), nn.logical_axis_rules(RULES):
        state, measurements = step(state, rng, batch)
    save_checkpoint(folder, state, i + 1)
# was: model = state["params"]
model = cj.mean_over_workers(state["params"])
after = float(loss_of(model, digits(100, 256)))
