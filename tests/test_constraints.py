"""Constraints and names of axes inside workers, as nanodo, big_vision and MaxText write them; and float32 masters.

Two workers: an exchange of the whole model makes both their average. So the oracle is the same step on one device, once
for each worker's batch, and a mean.
"""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj

RULES = (("act_batch", "data"), ("mlp", "model"), ("embed", None))
DATA = np.random.default_rng(0).standard_normal((2, 2, 24, 16), np.float32)  # [steps, workers, per worker, ...]
normal = nn.initializers.lecun_normal()


def blocks(page):
    text = (pathlib.Path(__file__).parents[1] / "docs" / page).read_text()
    return [block for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def program(page, *words):
    """What the blocks of a page define that have one of these words."""
    namespace = {"cj": cj, "jax": jax, "jnp": jnp}
    for block in blocks(page):
        if any(word in block for word in words):
            exec(block, namespace)
    return namespace


@pytest.fixture(scope="module")
def mesh():
    return cj.make_mesh(2, {"data": 2, "model": 2}, devices=jax.devices()[:8])


@pytest.fixture(scope="module")
def one():
    """A mesh of one device with the names of a worker's axes."""
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


OWN = []  # the mesh that a program of nanodo's kind has as a global
BOXES = {
    "logical": lambda names: nn.with_logical_partitioning(normal, ("embed", "mlp")),
    "partitioned": lambda names: nn.with_partitioning(normal, names),
    "general": lambda names: program("scaling.md", "nn.Partitioned")["named"](normal, names),
}
CONSTRAINTS = {
    "logical": lambda x: nn.with_logical_constraint(x, ("act_batch", "mlp")),
    "named sharding": lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(OWN[0], P("data", "model"))),
    "none": lambda x: x,
}


def bare(x):
    return jax.lax.with_sharding_constraint(x, P("data", "model"))


class Linen(nn.Module):
    """A layer whose names and constraints are those of one style."""

    style: str

    @nn.compact
    def __call__(self, x):
        box = BOXES.get(self.style, lambda names: normal)
        if self.style == "general":
            x = nn.DenseGeneral((4, 8), kernel_init=box((None, "model", None)))(x).reshape(*x.shape[:-1], 32)
        else:
            x = nn.Dense(32, kernel_init=box((None, "model")))(x)
        return nn.Dense(4)(jnp.tanh(CONSTRAINTS.get(self.style, bare)(x)))


def linen_step(style):
    net = Linen(style)

    def loss(params, x):
        with nn.logical_axis_rules(RULES):
            return jnp.mean((net.apply(params, x) - 1) ** 2)

    def init():
        with nn.logical_axis_rules(RULES):
            return net.init(jax.random.key(0), DATA[0, 0])

    return init, lambda params, x: jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 32, kernel_init=nnx.with_partitioning(normal, (None, "model")), rngs=rngs)
        self.last = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(bare(self.first(x))))


def nnx_step():
    def step(model, x):
        model = nnx.clone(model)  # what is changed in place would have to be returned
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return model

    return lambda: Nnx(nnx.Rngs(0)), step


STYLES = ("none", "bare", "named sharding", "logical", "partitioned", "general", "nnx")


def made(style):
    return nnx_step() if style == "nnx" else linen_step(style)


def gossiping(step, workers, state):
    """The states of all workers in the end, and the text of their program."""
    mix = cj.crossover(2, cut=cj.whole())
    run = cj.per_worker(lambda state, x, t: mix(step(state, x), t), workers, replicated=(2,))
    state = cj.copies(state, workers)
    run = run.lower(state, DATA[0], 0).compile()
    for t, x in enumerate(DATA):
        state = run(state, x, t)
    return [np.asarray(x) for x in jax.tree.leaves(state)], run.as_text()


def on_one_device(step, state):
    """The same, worker by worker, and their mean."""
    leaves, treedef = jax.tree.flatten(state)
    for x in DATA:
        each = [jax.tree.leaves(jax.jit(step)(jax.tree.unflatten(treedef, leaves), own)) for own in x]
        leaves = [np.mean(pair, axis=0) for pair in zip(*each, strict=True)]
    return leaves


@pytest.mark.parametrize("style", STYLES)
def test_a_step_with_constraints_is_the_step_of_one_device(style, mesh, one, monkeypatch):
    init, step = made(style)
    monkeypatch.setitem(globals(), "OWN", [one])
    with jax.set_mesh(one):
        state = init()
        expected = on_one_device(step, state)
        simulated, _ = gossiping(step, 2, state)
    monkeypatch.setitem(globals(), "OWN", [mesh])
    on_mesh, text = gossiping(step, mesh, jax.tree.map(np.asarray, state))
    for wanted, *found in zip(expected, simulated, on_mesh, strict=True):
        for worker in [worker for both in found for worker in both]:
            np.testing.assert_allclose(worker, wanted, atol=2e-6)
    # Each of a worker's 2 × 2 devices has a quarter of the hidden layer: 12 of 24 examples, 16 of 32 features.
    shapes = set(re.findall(r"f32\[([\d,]+)\]", text))
    assert ("12,16" in shapes, "24,32" in shapes) == (style != "none", style == "none")


def test_what_a_constraint_lacks_is_said():
    def step(x):
        return jax.lax.with_sharding_constraint(x, P("data"))

    x = jnp.ones((2, 4))
    with pytest.raises(RuntimeError, match=r"jax\.set_mesh"):
        cj.per_worker(step, 2)(x)
    with pytest.raises(ValueError, match=r"data .* is not found in mesh"):
        cj.per_worker(step, cj.make_mesh(2, devices=jax.devices()[:2]))(x)
    with_data = cj.make_mesh(2, {"data": 1}, devices=jax.devices()[:2])
    np.testing.assert_array_equal(cj.per_worker(step, with_data, donate=False)(x), x)


def test_masters_are_updated_and_exchanged_in_float32_and_parameters_are_their_roundings():
    n, rate, steps = 4, 1e-4, 20
    pool = cj.topology.exponential(n)
    mix = cj.gossip(pool, cj.whole(), cj.topology.cycle)
    algorithm = program("scaling.md", "def with_masters")["with_masters"](cj.mix_after(optax.sgd(rate), mix))
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    targets = np.random.default_rng(1).standard_normal((n, 8), np.float32)

    def step(state, target, t):
        params, own = state
        grads = jax.grad(lambda p: ((p["w"].astype(jnp.float32) - target) ** 2).sum())(params)
        return algorithm.update(grads, own, params, t)

    run = cj.per_worker(step, n, replicated=(2,))
    state = cj.copies((params, algorithm.init(params)), n)
    masters = np.ones((n, 8))
    for t in range(steps):
        state = run(state, targets, t)
        rounded = np.asarray(jnp.asarray(masters, jnp.bfloat16), np.float64)
        grads = np.asarray(jnp.asarray(2 * (rounded - targets), jnp.bfloat16), np.float64)
        masters = pool.matrix(t % pool.num_rounds) @ (masters - rate * grads)
    found, (kept, _) = state
    assert (found["w"].dtype, kept["w"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(kept["w"], masters, atol=2e-6)
    np.testing.assert_array_equal(found["w"], kept["w"].astype(jnp.bfloat16))
    assert np.abs(masters - 1).max() > 1e-3  # where bfloat16 alone would have stayed at 1
    alone = jnp.ones((n, 8), jnp.bfloat16) - jnp.bfloat16(rate) * jnp.asarray(2 * (1 - targets), jnp.bfloat16)
    assert (alone == 1).all()
