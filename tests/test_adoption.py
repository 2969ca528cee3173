"""The library in somebody else's training loop: linen, nnx, Equinox and no framework at all."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj

WORKERS = 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(WORKERS, 32, 8)).astype(np.float32)
Y = X.sum(-1, keepdims=True)


def places():
    return [WORKERS, cj.make_mesh(WORKERS, devices=jax.devices()[:WORKERS])]


def place(tree, where):
    return tree if isinstance(where, int) else jax.device_put(tree, NamedSharding(where, P("worker")))


def crossover(optimizer=None):
    return cj.crossover_sgd(optimizer or optax.sgd(0.02, momentum=0.9), WORKERS)


def test_an_unchanged_flax_train_state_step_trains_alike_on_a_mesh_and_simulated():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(16)(x)))

    net = Net()
    params = net.init(jax.random.key(0), X[0])
    algorithm = crossover()

    def train_step(state, batch):  # written for one device, knows nothing of workers
        x, y = batch
        loss, grads = jax.value_and_grad(lambda p: ((state.apply_fn(p, x) - y) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    ends = []
    for where in places():
        state = TrainState.create(apply_fn=net.apply, params=params, tx=cj.as_optax(algorithm))
        state, step = cj.copies(state, where), cj.per_worker(train_step, where)
        losses = []
        for _ in range(30):
            state, loss = step(state, place((X, Y), where))
            losses.append(np.asarray(loss).mean())
        assert losses[-1] < 0.1 * losses[0]
        assert step._cache_size() == 1
        assert int(cj.one_worker(state, 3).step) == 30
        ends.append(state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *ends)

    # The same by the algorithm itself: as_optax rounds once more, nothing else.
    def plain_step(state, batch, t):
        params, inner = state
        grads = jax.grad(lambda p: ((net.apply(p, batch[0]) - batch[1]) ** 2).mean())(params)
        return algorithm.update(grads, inner, params, t)

    state = cj.copies((params, algorithm.init(params)), WORKERS)
    step = cj.per_worker(plain_step, WORKERS, replicated=(2,))
    for t in range(30):
        state = step(state, (X, Y), jnp.int32(t))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ends[0], state[0])


@pytest.mark.parametrize("name", ["sgp", "local_sgd", "every", "paper", "relative"])
def test_as_optax_runs_algorithms_that_need_a_common_step_and_counts_it(name):
    """What compiles to a conditional waits for ever where counts differ: here all take the highest, or `step=`."""
    params = {"a": jnp.zeros(30), "b": jnp.ones(5)}
    optimizer = optax.sgd(0.1, momentum=0.9)
    algorithm = {
        "sgp": lambda: cj.sgp(optimizer, WORKERS),
        "local_sgd": lambda: cj.local_sgd(optimizer, 3),
        "every": lambda: cj.mix_after(optimizer, cj.every(2, cj.crossover(WORKERS))),
        "paper": lambda: cj.crossover_sgd_paper(optimizer, WORKERS, cj.by_module(params), pool_size=4),
        "relative": lambda: cj.mix_relative(optimizer, cj.crossover(WORKERS), 3),
    }[name]()
    tx = cj.as_optax(algorithm)
    grads = jax.tree.map(lambda x: jnp.broadcast_to(jnp.arange(8.0).reshape(8, 1), (8, *x.shape)), params)

    def by_count(state, g, t):
        updates, inner = tx.update(g, state[1], state[0])
        return optax.apply_updates(state[0], updates), inner

    def by_step(state, g, t):
        updates, inner = tx.update(g, state[1], state[0], step=t)
        return optax.apply_updates(state[0], updates), inner

    def by_algorithm(state, g, t):
        params, inner = algorithm.update(g, state[1].algorithm, state[0], t)
        return params, state[1]._replace(algorithm=inner)

    for where in places():
        ends = []
        for step in (by_count, by_step, by_algorithm):
            run = cj.per_worker(step, where, replicated=(2,))
            state = cj.copies((params, tx.init(params)), where)
            for t in range(6):
                state = run(state, place(grads, where), jnp.int32(t))
            ends.append(state)
        assert ends[0][1].count.tolist() == ends[1][1].count.tolist() == [6] * WORKERS
        for end in ends[:2]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), end[0], ends[2][0])


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(8, 16, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


class EqxNet(eqx.Module):
    body: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        self.body, self.head = (
            eqx.nn.Linear(i, o, key=k) for i, o, k in zip((8, 16), (16, 1), jax.random.split(key), strict=True)
        )

    def __call__(self, x):
        return self.head(jax.nn.relu(self.body(x)))


def an_nnx_state():
    graphdef, params = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, x: nnx.merge(graphdef, params)(x)


def an_equinox_module():
    params, static = eqx.partition(EqxNet(jax.random.key(0)), eqx.is_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


def a_tuple_of_arrays():
    params = (RNG.normal(size=(8, 16)) / 3, np.zeros((1, 16)), RNG.normal(size=(16, 1)) / 4)
    predict = lambda params, x: jax.nn.relu(x @ params[0] + params[1]) @ params[2]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), predict


@pytest.mark.parametrize("model", [an_nnx_state, an_equinox_module, a_tuple_of_arrays])
@pytest.mark.parametrize("modules", [False, True])
def test_any_pytree_of_parameters_trains(model, modules):
    params, predict = model()
    algorithm = crossover()
    if modules:
        cut = cj.by_module(params, 1)
        assert cut.num_segments == (3 if model is a_tuple_of_arrays else 2)
        algorithm = cj.crossover_sgd_paper(optax.sgd(0.02, momentum=0.9), WORKERS, cut, pool_size=4)

    def step(state, batch, t):
        params, inner = state
        loss, grads = jax.value_and_grad(lambda p: ((predict(p, batch[0]) - batch[1]) ** 2).mean())(params)
        return algorithm.update(grads, inner, params, t), loss

    ends = []
    for where in places():
        state, run = cj.copies((params, algorithm.init(params)), where), cj.per_worker(step, where, replicated=(2,))
        losses = []
        for t in range(30):
            state, loss = run(state, place((X, Y), where), jnp.int32(t))
            losses.append(np.asarray(loss).mean())
        assert losses[-1] < 0.2 * losses[0]
        ends.append(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *ends)


def test_only_adapters_travel_where_where_says_so():
    params = {"base": jnp.zeros(6), "lora": {"a": jnp.zeros(4), "b": jnp.zeros(3)}}
    mix = cj.gossip(
        cj.topology.exponential(WORKERS),
        cj.whole(),
        cj.topology.cycle(1, 3),
        leaves=lambda name: name.startswith("lora"),
    )
    algorithm = cj.mix_after(optax.sgd(1.0), mix)
    step = cj.per_worker(lambda s, g, t: algorithm.update(g, s[1], s[0], t), WORKERS, replicated=(2,))
    grads = jax.tree.map(lambda x: -jnp.broadcast_to(jnp.arange(8.0)[:, None], (8, *x.shape)), params)
    state = cj.copies((params, algorithm.init(params)), WORKERS)
    for t in range(3):  # the same gradients each time, so what is exchanged twice is averaged less
        state = step(state, grads if t == 0 else jax.tree.map(jnp.zeros_like, grads), jnp.int32(t))
    np.testing.assert_array_equal(state[0]["base"][:, 0], np.arange(8.0))
    np.testing.assert_allclose(state[0]["lora"]["a"], 3.5)
    np.testing.assert_allclose(state[0]["lora"]["b"], 3.5)
