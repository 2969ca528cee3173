"""Four workers of two devices: a small decoder sharded inside its worker (FSDP), gossiping between them.

Eight virtual CPU devices; the text is Python's own source. `specs` says how a model lies on its worker's devices, and
every device sends its part. Ends in bits per byte.
"""

import argparse
import inspect
import math

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import crossover_jax as cj  # new

jax.config.update("jax_num_cpu_devices", 8)
workers, steps = 4, 60
length, width, layers = 32, 64, 2
text = np.frombuffer(inspect.getsource(argparse).encode("latin-1", "replace"), np.uint8)
mesh = cj.make_mesh(workers, {"fsdp": 2}, devices=jax.devices()[: 2 * workers])  # new


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, width)(tokens) + self.param("place", nn.initializers.normal(0.02), (length, width))
        for _ in range(layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False)(y, mask=nn.make_causal_mask(tokens))
            x = x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))
        return nn.Dense(256)(nn.LayerNorm()(x))


def make_batch(i, size=32):
    starts = np.random.default_rng(i).integers(len(text) - length - 1, size=size)
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


net = Decoder()
params = net.init(jax.random.key(0), make_batch(0)[:, :-1])
specs = cj.fsdp_specs(params, mesh, min_size=2048)  # new
mix = cj.crossover(workers, specs=specs)  # new
tx = cj.as_optax(cj.mix_after(optax.adam(1e-2), mix))  # was: tx = optax.adam(1e-2)


def loss_fn(params, windows):
    logits = net.apply(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def train_step(state, windows):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, windows)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


state = params, tx.init(params)
places = specs, cj.state_specs(state[1], params, specs)  # new
state = cj.copies(state, mesh, specs=places)  # new
step = cj.per_worker(train_step, mesh, out_specs=(places, None))  # was: step = jax.jit(train_step, donate_argnums=0)
for i in range(steps):
    windows = make_batch(i)
    windows = cj.split(windows, mesh, P("fsdp"))  # new
    state, loss = step(state, windows)
print(f"workers are {cj.consensus_distance(state[0]):.3f} apart")  # new
model = cj.mean_over_workers(state[0])  # was: model = state[0]
print(f"bits per byte {loss_fn(model, make_batch(steps)) / math.log(2):.3f}")
