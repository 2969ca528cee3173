"""The shape of nanoGPT in JAX: linen, TrainState, two groups of parameters (multi_transform), orbax."""

from functools import partial

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, latest_step, restore_checkpoint, save_checkpoint, text

n, workers, steps, folder = 8, 8, 8, None


class GPT(nn.Module):
    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(32, 16)(tokens)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)(y, mask=nn.make_causal_mask(tokens))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(32, use_bias=False)(nn.LayerNorm()(x))


def loss_of(params, apply_fn, tokens, **options):
    return cross_entropy(apply_fn({"params": params}, tokens[:, :-1], **options), tokens[:, 1:])


# was: @partial(jax.jit, donate_argnums=(0,))
@partial(cj.per_worker, workers=workers, replicated=("key",))
def step(state, tokens, key):
    rngs = {"dropout": jax.random.fold_in(key, state.step)}
    loss, grads = jax.value_and_grad(loss_of)(state.params, state.apply_fn, tokens, train=True, rngs=rngs)
    return loss, state.apply_gradients(grads=grads)


def create_state(net, tx):
    params = net.init(jax.random.key(0), text(0)[:, :-1])["params"]
    return TrainState.create(apply_fn=net.apply, params=params, tx=tx)


def groups(params):
    return jax.tree.map(lambda x: "decay" if x.ndim > 1 else "plain", params)


net, key = GPT(), jax.random.key(1)
tx = optax.multi_transform({"decay": optax.adamw(1e-2, weight_decay=0.1), "plain": optax.adam(1e-2)}, groups)
before = float(loss_of(create_state(net, tx).params, net.apply, text(100)))
# was: state = create_state(net, tx)
state = cj.copies(create_state(net, cj.as_optax(cj.crossover_sgd(tx, n))), workers)
state, iter_num = restore_checkpoint(folder, state), latest_step(folder)
while iter_num < steps:
    # was: loss, state = step(state, text(iter_num), key)
    loss, state = step(state, cj.split(text(iter_num), workers), key)
    iter_num += 1
    save_checkpoint(folder, state, iter_num)
# was: model = state.params
model = cj.mean_over_workers(state.params)
after = float(loss_of(model, net.apply, text(100)))
