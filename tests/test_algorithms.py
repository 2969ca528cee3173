"""The contract that every algorithm joins with one line of `ALGORITHMS`, and each algorithm against its definition."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax.push_sum import PushSumState
from examples.own_algorithm import elastic
from experiments.compiled import collectives
from experiments.step import init_state, make_train_step
from tests.oracles import mixed_by_matrices

WORKERS = 8
FEATURES, HIDDEN, CLASSES = 6, 16, 3


class Contract(NamedTuple):
    make: Callable  # (optimizer, num_workers, params) -> Algorithm
    permutes: int = 0  # in the compiled program of 8 workers, one dtype
    conditionals: int = 0
    all_reduces: int = 0
    all_gathers: int = 0  # of push-sum weights, a few numbers
    keeps_mean: bool = True
    contracts: bool = True


def paper(optimizer, num_workers, params, *, load_balanced=True, cut=None):
    cut = cj.by_module(params) if cut is None else cut
    return cj.crossover_sgd_paper(optimizer, num_workers, cut, pool_size=4, load_balanced=load_balanced, seed=2)


def pushed(optimizer, num_workers, params):
    return cj.sgp(optimizer, num_workers, pool=cj.topology.pull(num_workers, 4, seed=1).transpose())


def gossip(num_workers, **options):
    shifts = max(1, num_workers - 1)
    return cj.gossip(
        cj.topology.latin(num_workers, shifts), cj.by_size(shifts), cj.topology.shuffle(shifts, shifts), **options
    )


def relative(optimizer, num_workers, params):
    return cj.mix_relative(optimizer, gossip(num_workers), renew_every=3)


def outer(optimizer, num_workers, **options):
    return cj.outer(optimizer, None, cj.crossover(num_workers), every=2, **options)


def messages(pool):
    """Permutes that a pool compiles to: rows that move somebody and carry a share."""
    rows = [(r, s) for p, q in zip(pool.receive_from, pool.share, strict=True) for r, s in zip(p, q[1:], strict=True)]
    return sum(bool((r != np.arange(pool.num_workers)).any() and s.any()) for r, s in rows)


PULL, PUSH = cj.topology.pull(WORKERS, 4, seed=2), cj.topology.pull(WORKERS, 4, seed=1).transpose()
ALGORITHMS = {
    "allreduce": Contract(lambda o, n, p: cj.allreduce_sgd(o), all_reduces=1, contracts=False),
    "average_params": Contract(lambda o, n, p: cj.local_sgd(o), all_reduces=1),
    "local_sgd": Contract(lambda o, n, p: cj.local_sgd(o, 3), conditionals=1, all_reduces=1),
    "sgp": Contract(lambda o, n, p: cj.sgp(o, n), permutes=3, conditionals=1),
    "sgp2": Contract(lambda o, n, p: cj.sgp(o, n, peers=2), permutes=4, conditionals=1),
    "push_sum": Contract(pushed, permutes=messages(PUSH), conditionals=1, all_gathers=1),
    "d_psgd": Contract(lambda o, n, p: cj.d_psgd(o, n), permutes=2),
    "crossover": Contract(lambda o, n, p: cj.crossover_sgd(o, n), permutes=7),
    "crossover_during": Contract(lambda o, n, p: cj.mix_during(o, cj.crossover(n)), permutes=7),
    "crossover_local": Contract(
        lambda o, n, p: cj.mix_after(o, cj.every(2, cj.crossover(n))), permutes=7, conditionals=1
    ),
    "crossover_stream": Contract(
        lambda o, n, p: cj.crossover_sgd(
            o,
            n,
            pool=cj.topology.exponential(n),
            cut=cj.by_size(6),
            table=cj.topology.stream(6, max(1, n.bit_length() - 1), every=2),
        ),
        permutes=3,
    ),
    "crossover_paper": Contract(paper, permutes=8, conditionals=2),
    "no_load_balancing": Contract(
        functools.partial(paper, load_balanced=False),
        permutes=2 * messages(PULL),
        conditionals=2,
        keeps_mean=False,
    ),
    "no_segments": Contract(functools.partial(paper, cut=cj.whole()), permutes=4, conditionals=1),
    "neither": Contract(
        functools.partial(paper, load_balanced=False, cut=cj.whole()),
        permutes=messages(PULL),
        conditionals=1,
        keeps_mean=False,
    ),
    "bfloat16": Contract(lambda o, n, p: cj.crossover_sgd(o, n, wire="bfloat16"), permutes=7),
    "int4": Contract(
        lambda o, n, p: cj.mix_relative(o, cj.crossover(n, wire="int4"), renew_every=5),
        permutes=7,
        conditionals=1,
        all_reduces=1,
    ),
    "relative": Contract(relative, permutes=7, conditionals=1, all_reduces=1),
    "shared_momentum": Contract(lambda o, n, p: cj.mix_with_momentum(o, cj.crossover(n)), permutes=14),
    "outer": Contract(lambda o, n, p: outer(o, n), permutes=7, conditionals=1),
    "outer_overlap": Contract(lambda o, n, p: outer(o, n, overlap=True), permutes=7, conditionals=1),
    "diloco": Contract(lambda o, n, p: cj.outer(o, None, cj.average(), every=2), conditionals=1, all_reduces=1),
    "elastic": Contract(lambda o, n, p: elastic(o, cj.crossover(n)), permutes=7),  # as a user writes one
    "two_rounds": Contract(lambda o, n, p: cj.mix_after(o, cj.repeat(2, cj.crossover(n))), permutes=14),
    "phases": Contract(lambda o, n, p: cj.crossover_sgd_phases(o, n), permutes=3),
    "two_pools": Contract(
        lambda o, n, p: cj.mix_after(
            o,
            cj.chain(
                *[
                    cj.gossip(
                        cj.topology.latin(n, max(1, min(2, n - 1)), s),
                        cj.by_size(2),
                        cj.topology.shuffle(2, max(1, min(2, n - 1)), seed=s),
                    )
                    for s in (0, 1)
                ]
            ),
        ),
        permutes=4,
    ),
}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def mesh():
    return cj.make_mesh(WORKERS, devices=jax.devices()[:WORKERS])


def place(tree, where):
    return tree if isinstance(where, int) else jax.device_put(tree, NamedSharding(where, P("worker")))


def random_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {
        "body": {"w": (FEATURES, HIDDEN), "scale": (HIDDEN,), "bias": (HIDDEN,)},
        "head": {"w": (HIDDEN, CLASSES)},
    }
    return jax.tree.map(lambda s: rng.normal(size=s).astype(dtype) / 2, shapes, is_leaf=lambda s: isinstance(s, tuple))


def loss_fn(params, model_state, batch, key):
    """Softmax regression on hidden units with BatchNorm and dropout, in plain JAX."""
    x, label, own_key = batch
    key = jnp.where(own_key.all(), key, jax.random.key(0))
    h = x @ params["body"]["w"]
    mean, var = h.mean(0), h.var(0)
    h = (h - mean[None]) / jnp.sqrt(var[None] + 1e-5) * params["body"]["scale"][None] + params["body"]["bias"][None]
    h = jax.nn.relu(h)
    h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h / 0.8, 0)
    logits = h @ params["head"]["w"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    model_state = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, model_state, {"mean": mean, "var": var})
    return loss, (model_state, {"loss": loss, "accuracy": (logits.argmax(-1) == label).mean()})


def random_batch(step, num_workers=WORKERS, per_worker=8, dtype=np.float32):
    """Images, labels, and, for each worker as often, whether its dropout is its own or that of the others."""
    rng = np.random.default_rng([7, step])
    x = rng.normal(size=(num_workers, per_worker, FEATURES)).astype(dtype)
    label = rng.integers(CLASSES, size=(num_workers, per_worker)).astype(np.int32)
    return x, label, np.ones_like(label, bool)


def optimizer():
    return optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9))


def start(algorithm, where, dtype=np.float32):
    params = jax.tree.map(jnp.asarray, random_params(dtype))
    model_state = {"mean": jnp.zeros(HIDDEN, dtype), "var": jnp.ones(HIDDEN, dtype)}
    return cj.copies(init_state(params, model_state, algorithm), where)


def train(name, where, steps, dtype=np.float32):
    num_workers = where if isinstance(where, int) else where.shape["worker"]
    algorithm = ALGORITHMS[name].make(optimizer(), num_workers, random_params())
    state, step = start(algorithm, where, dtype), make_train_step(loss_fn, algorithm, where)
    for t in range(steps):
        state, metrics = step(state, place(random_batch(t, num_workers, dtype=dtype), where), jnp.int32(t))
    return state, metrics, step, algorithm


@functools.cache
def three_steps(name):
    """On a mesh, for all tests of that program: `(state, metrics, step, algorithm)`."""
    return train(name, mesh(), 3)


def mixed_only(name, readings, tree):
    """`(params, model)` after each number of `readings` steps at learning rate zero, from workers that disagree."""
    algorithm = ALGORITHMS[name].make(optax.sgd(0.0, momentum=0.9), WORKERS, jax.tree.map(lambda x: x[0], tree))
    state = jax.vmap(algorithm.init)(jax.tree.map(jnp.asarray, tree))

    def step(both, t):
        params, state = both
        return algorithm.update(jax.tree.map(jnp.ones_like, params), state, params, t)

    model = jax.vmap(algorithm.model, axis_name="worker")
    run = cj.per_worker(step, WORKERS, replicated=(1,))
    both, read = (jax.tree.map(jnp.asarray, tree), state), []
    for t in range(max(readings)):
        both = run(both, jnp.int32(t))
        if t + 1 in readings:
            read.append(jax.device_get((both[0], model(*both))))  # a copy: the next step takes the buffers
    return read


def workers_apart():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=(WORKERS, *x.shape)).astype(np.float32), random_params())


@every_algorithm
def test_mean_or_mass_is_preserved_and_workers_agree_after_a_while_at_learning_rate_zero(name):
    tree = workers_apart()
    (early, _), (after, model) = mixed_only(name, (10, 40), tree)
    kept = [
        np.allclose(a.mean(0), b.mean(0), atol=1e-6) for a, b in zip(*map(jax.tree.leaves, (early, tree)), strict=True)
    ]
    assert all(kept) == ALGORITHMS[name].keeps_mean
    if not ALGORITHMS[name].contracts:
        jax.tree.map(np.testing.assert_array_equal, after, tree)
        return
    assert cj.consensus_distance(model) < 0.02 * cj.consensus_distance(tree)
    if ALGORITHMS[name].keeps_mean:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3], b.mean(0), atol=0.05), model, tree)


@every_algorithm
def test_identical_workers_stay_identical_bit_for_bit(name):
    _, _, step, algorithm = three_steps(name)
    state = start(algorithm, mesh())
    for t in range(5):
        x, label, own_key = random_batch(t)
        same = *(np.broadcast_to(x[:1], x.shape) for x in (x, label)), ~own_key
        state, _ = step(state, place(same, mesh()), jnp.int32(t))
    assert step._cache_size() == 1
    if name == "push_sum":  # x_i += u is not scaled by w_i: equal updates push unequal weights apart, as in the paper
        assert cj.consensus_distance(state.params) > 0
        return
    cj.check_copies(state)


def test_equal_data_and_dropout_give_workers_different_gradients():
    """By the keys that the step gives them, whatever the algorithm."""
    algorithm = cj.crossover_sgd(optimizer(), WORKERS)
    step = make_train_step(loss_fn, algorithm, WORKERS)
    same = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), random_batch(0))
    _, metrics = step(start(algorithm, WORKERS), same, jnp.int32(0))
    assert len(np.unique(np.asarray(metrics["grad_norm"]))) == WORKERS


@every_algorithm
def test_one_compilation_donated_state_and_the_promised_collectives(name):
    contract = ALGORITHMS[name]
    state, _, step, _ = three_steps(name)
    assert step._cache_size() == 1
    compiled = step.lower(state, place(random_batch(0), mesh()), jnp.int32(0)).compile()
    text = compiled.as_text()
    aliases = text[text.index("input_output_alias") :].split("\n")[0].count("may-alias")
    assert aliases == len(jax.tree.leaves(state))
    found = collectives(text)
    reduces = found.pop("all-reduce", 0)
    assert (reduces > 0) == (contract.all_reduces > 0)
    assert found.pop("conditional", 0) == contract.conditionals
    assert found.pop("collective-permute", 0) == contract.permutes
    assert found.pop("all-gather", 0) == contract.all_gathers
    assert not found


@every_algorithm
def test_mesh_is_simulation_in_float64_over_20_steps(name):
    with jax.enable_x64(True):
        on_mesh, _, _, _ = train(name, mesh(), 20, np.float64)
        simulated, _, _, _ = train(name, WORKERS, 20, np.float64)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), on_mesh, simulated)
        assert jax.tree.leaves(on_mesh.params)[0].dtype == np.float64


@pytest.mark.parametrize("name", ["crossover", "push_sum", "bfloat16"])
def test_mesh_is_simulation_in_float32_over_3_steps(name):
    on_mesh, metrics, _, _ = three_steps(name)
    simulated, also, _, _ = train(name, WORKERS, 3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (on_mesh, metrics), (simulated, also)
    )


@functools.cache
def plain_optax(steps):
    """Parameters that one worker must have, whatever the algorithm."""
    tx = optimizer()

    @jax.jit
    def step(params, model_state, opt, batch, t):
        key = functools.reduce(jax.random.fold_in, [t, 0, 0], jax.random.key(0))
        grads, (model_state, _) = jax.grad(loss_fn, has_aux=True)(params, model_state, batch, key)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), model_state, opt

    params = jax.tree.map(jnp.asarray, random_params())
    state = params, {"mean": jnp.zeros(HIDDEN), "var": jnp.ones(HIDDEN)}, tx.init(params)
    for t in range(steps):
        state = step(*state, jax.tree.map(lambda x: x[0], random_batch(t, 1)), t)
    return state[0]


@every_algorithm
def test_one_worker_is_plain_optax(name):
    state, _, _, _ = train(name, 1, 5)
    expected = plain_optax(5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-6), state.params, expected)


def deterministic_loss(params, model_state, batch, key):
    """Per-example losses only: neither BatchNorm nor dropout, so a batch is the average of its parts."""
    x, label, _ = batch
    h = jax.nn.relu(x @ params["body"]["w"] * params["body"]["scale"][None] + params["body"]["bias"][None])
    loss = optax.softmax_cross_entropy_with_integer_labels(h @ params["head"]["w"], label).mean()
    return loss, (model_state, {"loss": loss})


def test_allreduce_is_one_worker_with_the_whole_batch_and_bitwise_equal_workers():
    algorithm = cj.allreduce_sgd(optimizer())
    many, one = (make_train_step(deterministic_loss, algorithm, w) for w in (mesh(), 1))
    state, single = start(algorithm, mesh()), start(algorithm, 1)
    for t in range(10):
        batch = random_batch(t)
        state, _ = many(state, place(batch, mesh()), jnp.int32(t))
        single, _ = one(single, jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch), jnp.int32(t))
    cj.check_copies(state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-6), state.params, single.params)


def test_micro_batches_are_one_step_with_the_whole_batch():
    algorithm = cj.crossover_sgd(optimizer(), WORKERS)
    whole, parts = (make_train_step(deterministic_loss, algorithm, WORKERS, micro_batches=k) for k in (1, 4))
    a, b = start(algorithm, WORKERS), start(algorithm, WORKERS)
    for t in range(4):
        (a, _), (b, _) = (step(s, random_batch(t), jnp.int32(t)) for step, s in ((whole, a), (parts, b)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)
    with pytest.raises(ValueError, match="`micro_batches` must divide each worker's batch of 8, got 3"):
        make_train_step(deterministic_loss, algorithm, WORKERS, micro_batches=3)(b, random_batch(0), jnp.int32(0))


@pytest.mark.parametrize("where", ["mesh", "simulated"])
@pytest.mark.parametrize("order", ["after", "during", "all", "all, momentum twice"])
def test_mixing_after_during_and_momentum_too_are_their_equations(where, order):
    where = mesh() if where == "mesh" else WORKERS
    pool, table, cut = cj.topology.latin(WORKERS, 4), cj.topology.shuffle(4, 4), cj.by_size(4)
    optimizer, mix = optax.sgd(0.1, momentum=0.9), cj.crossover(WORKERS, pool=pool, table=table, cut=cut)
    momentum_rounds = {"all": 1, "all, momentum twice": 2}.get(order, 0)
    if momentum_rounds:
        algorithm = cj.mix_with_momentum(optimizer, mix, cj.repeat(momentum_rounds, mix))
    else:
        algorithm = (cj.mix_during if order == "during" else cj.mix_after)(optimizer, mix)
    x, target = workers_apart(), workers_apart()
    momentum = jax.tree.map(np.zeros_like, x)
    step = cj.per_worker(
        lambda s, target, t: algorithm.update(jax.tree.map(jnp.subtract, s[0], target), s[1], s[0], t), where, (2,)
    )
    state = place((jax.tree.map(jnp.asarray, x), jax.vmap(algorithm.init)(jax.tree.map(jnp.asarray, x))), where)
    for t in range(6):
        state = step(state, place(target, where), jnp.int32(t))
        momentum = jax.tree.map(lambda m, a, b: 0.9 * m + (a - b), momentum, x, target)
        stepped = jax.tree.map(lambda a, m: a - 0.1 * m, x, momentum)
        for i in range(momentum_rounds):
            momentum = mixed_by_matrices(momentum, momentum_rounds * t + i, pool, cut, table)
        if order == "during":
            mixed = mixed_by_matrices(x, t, pool, cut, table)
            x = jax.tree.map(lambda a, m: a - 0.1 * m, mixed, momentum)
        else:
            x = mixed_by_matrices(stepped, t, pool, cut, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state[0], x)


def test_momentum_of_adam_is_shared_and_its_count_is_not():
    tree = workers_apart()
    pool, table, cut = cj.topology.latin(WORKERS, 4), cj.topology.shuffle(4, 4), cj.by_size(4)
    algorithm = cj.mix_with_momentum(optax.adam(0.1, b1=0.9, b2=0.8), cj.gossip(pool, cut, table))
    state = cj.copies(algorithm.init(jax.tree.map(lambda x: jnp.asarray(x[0]), tree)), WORKERS)
    step = cj.per_worker(lambda g, s, x: algorithm.update(g, s, x, 2)[1][0], WORKERS)
    found = step(jax.tree.map(jnp.asarray, tree), state, jax.tree.map(jnp.asarray, tree))
    for moment, share, power in ((found.mu, 0.1, 1), (found.nu, 0.2, 2)):
        expected = mixed_by_matrices(jax.tree.map(lambda g: share * g**power, tree), 2, pool, cut, table)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moment, expected)
    assert found.count.tolist() == [1] * WORKERS


@pytest.mark.parametrize("place_of", [lambda: WORKERS, mesh], ids=["simulated", "mesh"])
def test_differences_to_a_reference_mix_like_the_parameters_and_in_int8_to_a_closer_agreement(place_of):
    x = np.random.default_rng(0).normal(size=(WORKERS, 7, 300)).astype(np.float32)
    where, start = place_of(), jnp.asarray(x[0])

    def mixed(algorithm, steps):
        step = cj.per_worker(lambda x, state, t: algorithm.update(0 * x, state, x, t), where, (2,))
        now, state = place(jnp.asarray(x), where), cj.copies(lambda: algorithm.init(start), where)
        for t in range(steps):
            now, state = step(now, state, jnp.int32(t))
        return np.asarray(now, np.float64), state

    plain, _ = mixed(cj.mix_after(optax.sgd(0.1), gossip(WORKERS)), 6)
    same, state = mixed(cj.mix_relative(optax.sgd(0.1), gossip(WORKERS), renew_every=5), 6)
    np.testing.assert_allclose(same, plain, atol=1e-6)
    reference = np.asarray(state.reference)
    np.testing.assert_array_equal(reference, np.broadcast_to(reference[0], x.shape))
    np.testing.assert_allclose(reference[0], x.mean(0), atol=1e-6)  # renewed once, from the workers of that step

    coarse, _ = mixed(cj.mix_after(optax.sgd(0.1), gossip(WORKERS, wire="int8")), 60)
    fine, _ = mixed(cj.mix_relative(optax.sgd(0.1), gossip(WORKERS, wire="int8"), renew_every=20), 60)
    apart = [np.sqrt(((each - each.mean(0)) ** 2).mean()) for each in (coarse, fine)]
    assert apart[0] > np.abs(x.mean(0)).max() / 127 / 12
    assert apart[1] < 1e-4 * apart[0]
    np.testing.assert_allclose(fine.sum(0), x.sum(0), atol=1e-4)


def test_a_reference_may_be_donated_beside_the_parameters():
    x = jnp.ones((1, 3))
    algorithm = cj.mix_relative(optax.sgd(0.1), cj.chain(), renew_every=2)
    step = cj.per_worker(lambda s: algorithm.update(s[0], s[1], s[0], 0), 1)
    params, state = step((x, algorithm.init(x)))
    assert params.tolist() == [[pytest.approx(0.9)] * 3]
    assert state.reference.tolist() == [[1.0] * 3]


def test_a_reference_leaves_what_stays_at_home_as_it_is():
    x = {"w": np.random.default_rng(0).normal(size=(WORKERS, 24)).astype(np.float32)}
    halves = cj.gossip(cj.topology.latin(WORKERS, 1), cj.by_size(2), np.array([[0, -1]]))
    algorithm = cj.mix_relative(optax.sgd(0.1), halves, renew_every=100)
    step = cj.per_worker(
        lambda x: algorithm.update({"w": 0 * x["w"]}, algorithm.init({"w": x["w"] / 3}), x, 0)[0], WORKERS
    )
    got = step(jax.tree.map(jnp.asarray, x))
    np.testing.assert_array_equal(got["w"][:, 12:], x["w"][:, 12:])
    assert np.abs(got["w"][:, :12] - x["w"][:, :12]).min() > 0


def test_momentum_can_be_shared_where_there_is_some():
    with pytest.raises(ValueError, match="`optimizer` must keep momentum in the shape of the parameters"):
        cj.mix_with_momentum(optax.sgd(0.1), cj.crossover(WORKERS)).init({"w": jnp.zeros(3)})


@pytest.mark.parametrize("where", ["mesh", "simulated"])
@pytest.mark.parametrize("segments", [1, 3])
def test_push_sum_is_numpys_on_a_pool_that_keeps_only_mass_with_decay_on_the_unbiased_parameters(where, segments):
    where = mesh() if where == "mesh" else WORKERS
    pool, cut = cj.topology.pull(WORKERS, 4, seed=5).transpose(), cj.by_size(segments)
    assert pool.keeps_mass
    assert not pool.keeps_agreement
    table = cj.topology.sample(segments, 4, seed=1)
    decay, lr = 0.1, 0.05
    algorithm = cj.push_sum(optax.chain(optax.add_decayed_weights(decay), optax.sgd(lr)), pool, cut, table)
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(2, WORKERS, 9)).astype(np.float32).astype(np.float64)
    segment = cut.segment_of(x[0].astype(np.float32))
    weights = np.ones((segments, WORKERS))

    def step(s, target, t):
        z = algorithm.model(s[0], s[1])
        return algorithm.update(z - target, s[1], s[0], t)

    run = cj.per_worker(step, where, (2,))
    state = (jnp.asarray(x, jnp.float32), cj.copies(algorithm.init(jnp.zeros(9)), WORKERS))
    state = place(state, where)
    for t in range(60):
        state = run(state, place(np.float32(target), where), jnp.int32(t))
        z = x / weights[segment].T
        x = x - lr * ((z - target) + decay * z)
        for s in range(segments):
            w = pool.matrix(int(table[t, s]))
            x[:, segment == s] = w @ x[:, segment == s]
            weights[s] = w @ weights[s]
    np.testing.assert_allclose(state[0], x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[1].weights[0], weights, rtol=1e-5)


def test_push_sum_divides_each_row_by_the_weight_of_its_segment():
    """A matrix whose columns are cut is as many vectors that are cut."""
    pool, table = cj.topology.pull(WORKERS, 4, seed=5).transpose(), cj.topology.sample(3, 4, seed=1)
    x = np.random.default_rng(0).normal(size=(WORKERS, 4, 9)).astype(np.float32)

    def model(x, cut):
        algorithm = cj.push_sum(optax.sgd(0.1), pool, cut, table)
        step = cj.per_worker(lambda x, s, t: algorithm.update(algorithm.model(x, s) - 1, s, x, t), WORKERS, (2,))
        state = cj.copies(algorithm.init(jnp.asarray(x[0])), WORKERS)
        now = jnp.asarray(x)
        for t in range(5):
            now, state = step(now, state, jnp.int32(t))
        return cj.per_worker(algorithm.model, WORKERS)(now, state)

    found = model(x, cj.by_rows(3, align=1))
    for row in range(4):
        np.testing.assert_allclose(found[:, row], model(x[:, row], cj.by_size(3)), rtol=1e-5, atol=1e-6)


def test_push_sum_reaches_the_true_average_where_plain_mixing_does_not():
    tree = workers_apart()
    ((biased, model),) = mixed_only("push_sum", (80,), tree)
    jax.tree.map(
        lambda z, x: np.testing.assert_allclose(z, np.broadcast_to(x.mean(0), x.shape), atol=1e-4), model, tree
    )
    assert cj.consensus_distance(biased) > 0.1


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_push_sum_in_a_narrow_wire_keeps_mass_and_weights_and_comes_to_the_true_average(wire):
    pool, table = cj.topology.pull(WORKERS, 4, seed=1).transpose(), cj.topology.cycle(1, 4)
    x = np.random.default_rng(0).normal(size=(WORKERS, 256)).astype(np.float32)
    algorithms = [cj.push_sum(optax.sgd(0.0), pool, cj.whole(), table, wire=each) for each in (None, wire)]
    models, weights = [], []
    for algorithm in algorithms:
        step = cj.per_worker(lambda x, s, t, a=algorithm: a.update(0 * x, s, x, t), WORKERS, (2,))
        now, state = jnp.asarray(x), cj.copies(algorithm.init(jnp.asarray(x[0])), WORKERS)
        for t in range(80):
            now, state = step(now, state, jnp.int32(t))
        np.testing.assert_allclose(now.sum(0), x.sum(0), atol=1e-4)
        models.append(cj.per_worker(algorithm.model, WORKERS)(now, state))
        weights.append(state.weights)
    np.testing.assert_array_equal(*weights)
    assert np.abs(np.asarray(models[0]) - x.mean(0)).max() < 1e-5
    # A message is rounded to a part of the largest value, which is biased: at most `largest` times the true one.
    largest = np.asarray(weights[0]).max() * np.abs(x.mean(0)).max()
    step_of_wire = {"bfloat16": 2**-8, "int8": 1 / 127}[wire] * largest
    smallest = np.asarray(weights[0]).min()
    assert 0 < np.abs(np.asarray(models[1]) - x.mean(0)).max() < 2 * step_of_wire / smallest


def test_sgp_on_the_exponential_graph_keeps_no_weights_because_they_stay_one():
    pool, table = cj.topology.exponential(WORKERS, 2), cj.topology.cycle(1, 2)
    with_weights = cj.push_sum(optax.sgd(0.1), pool, cj.whole(), table)
    without = cj.sgp(optax.sgd(0.1), WORKERS, peers=2)
    x = workers_apart()["head"]["w"]
    states = []
    for algorithm in (with_weights, without):
        step = cj.per_worker(lambda s, t, a=algorithm: a.update(a.model(*s), s[1], s[0], t), WORKERS, (1,))
        state = (jnp.asarray(x), cj.copies(algorithm.init(jnp.asarray(x[0])), WORKERS))
        for t in range(7):
            state = step(state, jnp.int32(t))
        states.append(state)
    np.testing.assert_allclose(states[0][0], states[1][0], rtol=1e-6)
    np.testing.assert_allclose(states[0][1].weights, 1.0, rtol=1e-6)
    assert not jax.tree.leaves(states[1][1])


def one_round(algorithm, tree, t):
    """One update of all simulated workers with gradients `x − 1` at step t."""
    state = cj.copies(algorithm.init(jax.tree.map(lambda x: jnp.asarray(x[0]), tree)), WORKERS)
    step = cj.per_worker(
        lambda s, t: algorithm.update(jax.tree.map(lambda x: x - 1, s[0]), s[1], s[0], t), WORKERS, replicated=(1,)
    )
    return step((jax.tree.map(jnp.asarray, tree), state), jnp.int32(t))[0]


def test_the_papers_algorithm_draws_from_its_balanced_pool_independently():
    tree = workers_apart()
    cut = cj.by_module(jax.tree.map(lambda x: x[0], tree))
    got = one_round(cj.crossover_sgd_paper(optax.sgd(0.1), WORKERS, cut, pool_size=5, seed=3), tree, 7)
    stepped = jax.tree.map(lambda x: x - 0.1 * (x - 1), tree)
    expected = mixed_by_matrices(stepped, 7, cj.topology.balanced(WORKERS, 5, 3), cut, cj.topology.sample(2, 5, seed=3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_d_psgd_mixes_the_parameters_before_the_update_and_the_optimizer_sees_them_unmixed():
    tree = workers_apart()
    decayed = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    got = one_round(cj.d_psgd(decayed, WORKERS), tree, 0)
    mixed = mixed_by_matrices(tree, 0, cj.topology.ring(WORKERS), cj.whole(), cj.topology.cycle(1, 1))
    expected = jax.tree.map(lambda m, x: m - 0.1 * ((x - 1) + 0.5 * x), mixed, tree)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_every_segment_in_its_own_phase_averages_exactly_after_one_pass():
    ((after, _),) = mixed_only("phases", (3,), workers_apart())
    jax.tree.map(lambda x: np.testing.assert_allclose(x, np.broadcast_to(x.mean(0), x.shape), atol=1e-6), after)


def test_the_seed_draws_pool_and_table_and_a_cut_keeps_its_channels():
    tree = workers_apart()
    rounds = [one_round(cj.crossover_sgd(optax.sgd(0.1), WORKERS, seed=seed), tree, 0) for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, rounds[0], rounds[1])
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, rounds[1:]), strict=True))
    expected = mixed_by_matrices(
        jax.tree.map(lambda x: x - 0.1 * (x - 1), tree),
        0,
        cj.topology.latin(WORKERS, 7, 1),
        cj.by_size(7),
        cj.topology.shuffle(7, 7, seed=1),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), rounds[2], expected)
    for segments in (4, 6, 8, 12):
        assert cj.crossover(WORKERS, cut=cj.by_size(segments)).can_overlap
    with pytest.raises(ValueError, match="got 13: take 12 or 14"):  # 7 shifts there are, and none of 4 to 7 divides 13
        cj.crossover(WORKERS, cut=cj.by_size(13))


def test_push_sum_weights_stay_at_home_with_their_segment_and_are_float64_under_x64():
    pool, table = cj.topology.pull(WORKERS, 4, seed=5).transpose(), cj.topology.stream(2, 4, every=2, period=16)
    with jax.enable_x64(True):
        algorithm = cj.push_sum(optax.sgd(0.0), pool, cj.by_size(2), table)
        x = np.random.default_rng(0).normal(size=(WORKERS, 6))
        state = (jnp.asarray(x), cj.copies(algorithm.init(jnp.zeros(6)), WORKERS))
        step = cj.per_worker(lambda s, t: algorithm.update(jnp.zeros(6), s[1], s[0], t), WORKERS, (1,))
        weights = np.ones((2, WORKERS))
        for t in range(9):
            state = step(state, jnp.int32(t))
            for s, p in enumerate(table[t]):
                weights[s] = pool.matrix(p) @ weights[s] if p >= 0 else weights[s]
        assert state[1].weights.dtype == np.float64
        np.testing.assert_allclose(state[1].weights[3], weights, rtol=1e-12)


def test_extra_arguments_reach_the_optimizer():
    plateau = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    for tx in (cj.as_optax(cj.crossover_sgd(plateau, WORKERS)), cj.as_optax(cj.allreduce_sgd(plateau))):
        step = cj.per_worker(lambda s, tx=tx: tx.update(s[0], s[1], s[0], value=jnp.float32(3)), WORKERS)
        step(cj.copies((jnp.zeros(40), tx.init(jnp.zeros(40))), WORKERS))


def test_a_worker_that_skips_a_bad_gradient_inside_the_algorithm_still_exchanges():
    tx = cj.as_optax(cj.crossover_sgd(optax.apply_if_finite(optax.sgd(0.1), 3), WORKERS))
    step = cj.per_worker(lambda s, g: tx.update(g, s[1], s[0]), mesh())
    state = cj.copies((jnp.ones(40), tx.init(jnp.ones(40))), mesh())
    grads = jnp.ones((WORKERS, 40)).at[3].set(jnp.nan)
    updates, _ = step(state, place(grads, mesh()))
    assert np.isfinite(updates).all()
    assert len(np.unique(np.asarray(updates).round(6))) > 1


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="`num_workers` must be at least 1, got 0"):
        cj.crossover_sgd(optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match="`pool` must be for `num_workers` = 4 workers, got one for 8"):
        cj.crossover_sgd(optax.sgd(0.1), 4, pool=cj.topology.latin(8, 2))
    for unbound in (
        lambda: cj.every(2, cj.average())(jnp.zeros(2), 0),
        lambda: pushed(optax.sgd(0.1), 8, None).model(jnp.zeros(2), PushSumState((), jnp.ones((1, 8)))),
    ):
        with pytest.raises(ValueError, match="axis 'worker' is not bound"):
            unbound()
    with pytest.raises(ValueError, match="`pool` must keep mass"):
        cj.push_sum(optax.sgd(0.1), cj.topology.pull(8, 2), cj.whole(), cj.topology.cycle(1, 2))
    with pytest.raises(ValueError, match="`algorithm` must train its parameters as they are"):
        cj.as_optax(pushed(optax.sgd(0.1), 8, None))
    tx = cj.as_optax(cj.allreduce_sgd(optax.sgd(0.1)))
    with pytest.raises(ValueError, match="`params` must be passed to `update`"):
        tx.update({}, tx.init({}))
