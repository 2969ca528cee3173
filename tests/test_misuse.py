"""What users do wrong without a word: each is refused by one sentence, or does what was meant."""

import dataclasses
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax.leaves import flatten
from crossover_jax.traced import wire_bytes
from crossover_jax.wire import LARGEST, Wire

WORKERS = 8
SGD = optax.sgd(0.1, momentum=0.9)


def mesh(inner=None):
    return cj.make_mesh(
        WORKERS, inner, devices=jax.devices()[: WORKERS * np.prod([*(inner or {}).values()], dtype=int)]
    )


def places():
    return [WORKERS, mesh()]


# --- what travels


LORA = {"base": jnp.zeros((1000, 100)), "lora": {"a": jnp.zeros((100, 4)), "b": jnp.zeros((4, 100))}}


@pytest.mark.parametrize(
    "make", [lambda leaves: cj.crossover(WORKERS, leaves=leaves), lambda leaves: cj.average(leaves=leaves)]
)
def test_a_filter_that_chooses_nothing_is_refused(make):
    with pytest.raises(
        ValueError, match=r"`leaves` must choose at least one .* The names are 'base', 'lora/a', 'lora/b'"
    ):
        cj.per_worker(make(lambda name: "lorra" in name), WORKERS, (1,))(cj.copies(LORA, WORKERS), jnp.int32(0))


@pytest.mark.parametrize(
    "combine",
    [
        lambda mix: mix,
        lambda mix: cj.repeat(2, mix),
        lambda mix: cj.chain(mix, mix),
        lambda mix: cj.every(1, mix),
    ],
)
def test_a_reference_is_renewed_for_what_travels_only(combine):
    """Bytes of adapters alone, whatever the mix is made of: 4 (n − 1)/n · 2 · 800 for the average, every step."""
    mix = combine(cj.crossover(WORKERS, leaves=lambda name: name.startswith("lora")))
    algorithm = cj.mix_relative(SGD, mix, renew_every=1)
    state = jax.eval_shape(algorithm.init, LORA)
    sent = wire_bytes(lambda x, s: algorithm.update(x, s, x, 0), LORA, state, num_workers=WORKERS)
    exchanged = wire_bytes(lambda x: mix(x, 0), LORA, num_workers=WORKERS)
    assert sent == exchanged + 800 * 4 * 2 * 7 / 8
    assert sent < 20_000


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Only:
    value: jax.Array


def test_a_field_named_value_keeps_its_name_and_a_variable_of_nnx_has_none():
    names, _, _ = flatten({"attention": Attention(jnp.zeros(1), jnp.zeros(1)), "only": Only(jnp.zeros(2))})
    assert names == ["attention/query", "attention/value", "only/value"]
    names, leaves, treedef = flatten(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    assert names == ["bias", "kernel"]
    assert [x.shape for x in jax.tree.leaves(treedef.unflatten(leaves))] == [(3,), (2, 3)]


# --- poor mixing


@pytest.mark.parametrize("num_workers", [8, 16, 64, 100])
@pytest.mark.parametrize("cut", [cj.by_size, cj.by_rows])
def test_any_number_of_segments_mixes_or_is_refused(num_workers, cut):
    best = cj.topology.contraction(cj.topology.latin(num_workers, cj.topology.advised_pool_size(num_workers))).worst
    for segments in range(1, 40):
        try:
            mix = cj.crossover(num_workers, cut=cut(segments))
        except ValueError:  # whose advice tests/topology/test_random.py follows
            continue
        size = cj.topology.advised_pool_size(num_workers, segments)
        worst = cj.topology.contraction(cj.topology.latin(num_workers, size)).worst
        assert np.log(worst) < 0.49 * np.log(best)
        assert mix.can_overlap == (segments % size == 0)


def test_hiding_behind_a_conditional_is_warned_of_where_it_is_asked_for():
    switch = cj.crossover(WORKERS, table=cj.topology.sample)
    for mix in (switch, cj.every(2, cj.crossover(WORKERS)), cj.chain(cj.average(), switch), cj.repeat(2, switch)):
        with pytest.warns(UserWarning, match="`mix` compiles to a conditional, so `mix_during` hides nothing"):
            cj.mix_during(SGD, mix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mix in (cj.crossover(WORKERS), cj.repeat(3, cj.crossover(WORKERS)), cj.average(), lambda x, t: x):
            cj.mix_during(SGD, mix)


# --- narrow wires


POOLS = {
    "ring": cj.topology.ring(WORKERS),
    "complete": cj.topology.complete(WORKERS),
    "base": cj.topology.base(WORKERS, 2),
    "exponential": cj.topology.exponential(WORKERS, 2),
    "latin": cj.topology.latin(WORKERS, 4),
}


@pytest.mark.parametrize("wire", ["int4", "int8", "float16", "bfloat16"])
@pytest.mark.parametrize("pool", POOLS)
def test_what_is_positive_stays_positive_and_the_sum_holds(pool, wire):
    """Beside values of either sign, at any own share, for ten rounds; numpy adds up in float64."""
    rng = np.random.default_rng(0)
    tree = {
        "nu": np.exp(rng.normal(size=(WORKERS, 3000)) * 6).astype(np.float32),
        "zero": np.where(rng.random((WORKERS, 700)) < 0.5, 0, rng.random((WORKERS, 700))).astype(np.float32),
        "w": rng.normal(size=(WORKERS, 333)).astype(np.float32),
    }
    mix = cj.gossip(POOLS[pool], cj.by_size(4), wire=wire)
    for where in places():
        step, mixed = cj.per_worker(mix, where, (1,)), jax.tree.map(jnp.asarray, tree)
        mixed = mixed if isinstance(where, int) else jax.device_put(mixed, NamedSharding(where, P("worker")))
        for t in range(10):
            mixed = step(mixed, jnp.int32(t))
            assert np.asarray(mixed["nu"]).min() > 0
            assert np.asarray(mixed["zero"]).min() >= 0
        for key, x in tree.items():
            np.testing.assert_allclose(
                np.asarray(mixed[key], np.float64).sum(0), x.astype(np.float64).sum(0), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("wire", ["int4", "int8", "float16", "bfloat16", "float32"])
def test_a_message_rounded_towards_zero_lies_between_zero_and_its_value(wire):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=1000) * 10.0 ** rng.integers(-30, 4, 1000), [0.0, -0.0, 127.0, 1.0, 65504.0]])
    x = x.astype(np.float64 if wire == "float32" else np.float32)
    with jax.enable_x64(wire == "float32"):
        q = np.asarray(Wire(wire, toward_zero=True).quantize(jnp.asarray(x)), np.float64)
        nearest = np.asarray(Wire(wire).quantize(jnp.asarray(x)), np.float64)
    assert (np.abs(q) <= np.abs(x)).all()
    assert (q * x >= 0).all()
    block = np.abs(np.pad(x, (0, -len(x) % 256)).reshape(-1, 256)).max(1).repeat(256)[: len(x)]
    integers = LARGEST.get(wire)
    step = (
        block / integers
        if integers
        else np.maximum(np.abs(x) * float(jnp.finfo(wire).eps), float(jnp.finfo(wire).tiny))
    )
    assert (np.abs(q - x) <= 1.0001 * step).all()
    assert (np.abs(nearest - x) <= 0.5001 * step + (0 if integers else float(jnp.finfo(wire).tiny))).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wire", ["int4", "int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("pool", ["latin", "ring"])
def test_nothing_finite_becomes_infinite(pool, wire, dtype):
    """The largest numbers of the leaf's dtype, on all workers or on one of them, in either sign."""
    with jax.enable_x64(True):
        largest = np.array(jnp.finfo(dtype).max, jnp.dtype(dtype))
        also = min(70000.0, float(largest))  # which float16 does not know
        x = np.tile(np.array([largest, -largest, also, 1, 0, 1e-6], jnp.dtype(dtype)), (WORKERS, 50))
        one = x.copy()
        one[1:, :150] = 0
        step = cj.per_worker(cj.gossip(POOLS[pool], cj.by_size(4), wire=wire), WORKERS, (1,))
        for tree in (x, one):
            mixed = jnp.asarray(tree)
            for t in range(3):
                mixed = step(mixed, jnp.int32(t))
                assert jnp.isfinite(mixed).all()
        if wire not in LARGEST:
            np.testing.assert_allclose(
                step(jnp.asarray(x), jnp.int32(0)).astype(float), x.astype(float), rtol=0.01, atol=1e-5
            )


def test_a_number_that_is_not_finite_does_not_spoil_its_block_of_int8():
    x = np.ones((WORKERS, 512), np.float32)
    x[1, 3] = np.nan
    x[2, 400] = np.inf
    mixed = cj.per_worker(cj.gossip(POOLS["latin"], cj.whole(), cj.topology.cycle, wire="int8"), WORKERS, (1,))(
        x, jnp.int32(0)
    )
    wrong = ~np.isfinite(mixed)
    assert wrong.sum() == 2  # each where it was
    assert wrong[1, 3]
    assert wrong[2, 400]
    assert (np.abs(np.asarray(mixed)[~wrong]) <= 1.01).all()


# --- copies


class Constant(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.arange(3.0))

    def __call__(self):
        return {"out": jnp.full(3, 3.0)}


def test_a_module_is_a_tree_though_it_can_be_called():
    for make, shape in ((Constant, (8, 3)), (lambda: eqx.nn.Linear(3, 4, key=jax.random.key(0)), (8, 4, 3))):
        for where in places():
            assert jax.tree.leaves(cj.copies(make(), where))[0].shape == shape
            assert jax.tree.leaves(cj.abstract_copies(make(), where))[0].shape == shape
            assert jax.tree.leaves(cj.copies(make, where))[0].shape == shape


@pytest.mark.parametrize(
    "make", [jax.random.key, jax.random.PRNGKey, lambda seed: jax.random.split(jax.random.key(seed), 3)]
)
def test_every_worker_draws_its_own_noise_and_one_alone_what_it_always_drew(make):
    tree = {"dropout": make(7), "w": jnp.ones(2), "n": jnp.arange(2)}
    drawn = [cj.copies(tree, where)["dropout"] for where in places()] + [cj.copies(lambda: tree, mesh())["dropout"]]
    raw = [np.asarray(jax.random.key_data(k) if jnp.issubdtype(k.dtype, jax.dtypes.prng_key) else k) for k in drawn]
    for other in raw[1:]:
        np.testing.assert_array_equal(raw[0], other)
    assert len(np.unique(raw[0].reshape(-1, 2), axis=0)) == raw[0].size // 2
    first = jax.random.key_data(make(7)) if jnp.issubdtype(make(7).dtype, jax.dtypes.prng_key) else make(7)
    np.testing.assert_array_equal(raw[0][0], first)
    cj.check_copies(cj.copies(tree, WORKERS))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_replicated_key_is_each_workers_own_alike_on_a_mesh_and_simulated(make):
    def step(x, keys):
        return x + jax.random.uniform(jax.random.fold_in(keys["dropout"], 3))

    got = [
        np.asarray(cj.per_worker(step, where, ("keys",), donate=False)(jnp.zeros(WORKERS), keys={"dropout": make(0)}))
        for where in places()
    ]
    np.testing.assert_array_equal(*got)
    assert len(np.unique(got[0])) == WORKERS
    assert got[0][0] == jax.random.uniform(jax.random.fold_in(make(0), 3))


def test_an_optimizer_that_draws_draws_apart():
    tx = optax.chain(optax.add_noise(1.0, 0.0, key=0), optax.sgd(1.0))
    algorithm = cj.mix_after(tx, cj.chain())
    state = cj.copies((jnp.zeros(5), algorithm.init(jnp.zeros(5))), WORKERS)
    moved = cj.per_worker(lambda s: algorithm.update(jnp.zeros(5), s[1], s[0], 0), WORKERS)(state)[0]
    assert len(np.unique(moved[:, 0])) == WORKERS


def test_tied_weights_are_refused_and_shared_arrays_are_not():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Param(jnp.ones(3))
            self.head = self.embed

    for tree in (Tied(), (Tied(), jnp.zeros(2)), lambda: {"model": Tied()}):
        with pytest.raises(ValueError, match=r"stands twice in the tree: the copies of a tied weight would come apart"):
            cj.copies(tree, WORKERS)
    zeros = jnp.zeros(3)
    cj.copies({"a": zeros, "b": zeros, "c": (zeros, zeros)}, WORKERS)
    cj.copies(nnx.split(Tied())[1], WORKERS)
    layer = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    cj.copies([layer, layer], WORKERS)  # in Equinox two places are two weights


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(ValueError, match=r"leaf 'layers/1/fn' must be an array, got .*: keep what is no array out"):
        cj.copies(eqx.nn.Sequential([eqx.nn.Linear(2, 2, key=jax.random.key(0)), eqx.nn.Lambda(jax.nn.relu)]), WORKERS)


def test_counters_that_begin_as_a_python_number_compile_once():
    state = cj.copies({"step": 0, "flag": True, "scale": 1.0}, WORKERS)
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    step = cj.per_worker(lambda s: {**s, "step": s["step"] + 1, "scale": s["scale"] * 2}, WORKERS)
    for _ in range(3):
        state = step(state)
    assert step._cache_size() == 1


# --- dtypes


def test_integer_leaves_and_flags_pass_through_as_optax_and_counts_are_one_dtype():
    params = {"w": jnp.ones(20), "table": jnp.arange(5), "flag": jnp.array(True)}
    tx = cj.as_optax(cj.crossover_sgd(optax.sgd(0.1), WORKERS))

    def step(state):
        grads = jax.tree.map(jnp.zeros_like, state[0])
        updates, inner = tx.update(grads, state[1], state[0])
        return optax.apply_updates(state[0], updates), inner

    for where in places():
        run, state = cj.per_worker(step, where), cj.copies((params, tx.init(params)), where)
        for _ in range(3):
            state = run(state)
        assert run._cache_size() == 1
        np.testing.assert_array_equal(state[0]["table"], np.tile(np.arange(5), (WORKERS, 1)))
        assert state[0]["table"].dtype == jnp.int32
        assert state[0]["flag"].all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_parameters_keep_their_dtype_in_loops_that_add_by_themselves(dtype):
    tx = cj.as_optax(cj.crossover_sgd(optax.sgd(0.1, momentum=0.9), WORKERS))
    algorithm = cj.crossover_sgd(optax.sgd(0.1, momentum=0.9), WORKERS)
    x = jax.random.normal(jax.random.key(0), (WORKERS, 60)).astype(dtype)

    def step(state, t):
        updates, inner = tx.update(state[0] / 7, state[1], state[0])
        return jax.tree.map(lambda p, u: p + u, state[0], updates), inner

    def exact(state, t):
        return algorithm.update(state[0] / 7, state[1].algorithm, state[0], t)

    init = cj.copies(tx.init(x[0]), WORKERS)
    expected = cj.per_worker(exact, WORKERS, (1,), donate=False)((x, init), jnp.int32(0))[0]
    run, state = cj.per_worker(step, WORKERS, (1,)), (x, init)
    for t in range(3):
        state = run(state, jnp.int32(t))
        if t == 0:
            larger = np.maximum(
                np.abs(np.asarray(expected, np.float32)),
                np.abs(np.asarray(jax.random.normal(jax.random.key(0), (WORKERS, 60)))),
            )
            apart = np.abs(np.asarray(state[0], np.float32) - np.asarray(expected, np.float32))
            assert (apart <= larger * float(jnp.finfo(dtype).eps)).all()
    assert state[0].dtype == dtype
    assert run._cache_size() == 1


ALL = {
    "after": lambda: cj.crossover_sgd(SGD, WORKERS),
    "during": lambda: cj.mix_during(SGD, cj.crossover(WORKERS)),
    "with momentum": lambda: cj.mix_with_momentum(SGD, cj.crossover(WORKERS)),
    "int8": lambda: cj.mix_after(SGD, cj.repeat(3, cj.crossover(WORKERS, wire="int8"))),
    "int8 on a ring": lambda: cj.mix_after(SGD, cj.gossip(cj.topology.ring(WORKERS), cj.by_size(2), wire="int8")),
    "bfloat16": lambda: cj.crossover_sgd(SGD, WORKERS, wire="bfloat16"),
    "float16": lambda: cj.crossover_sgd(SGD, WORKERS, wire="float16"),
    "relative": lambda: cj.mix_relative(SGD, cj.crossover(WORKERS), 2),
    "every": lambda: cj.mix_after(SGD, cj.every(2, cj.crossover(WORKERS))),
    "sgp": lambda: cj.sgp(SGD, WORKERS),
    "push-sum": lambda: cj.sgp(SGD, WORKERS, pool=cj.topology.pull(WORKERS, 3).transpose()),
    "paper": lambda: cj.crossover_sgd_paper(SGD, WORKERS, cj.by_size(3), pool_size=4),
    "d_psgd": lambda: cj.d_psgd(SGD, WORKERS),
    "allreduce": lambda: cj.allreduce_sgd(SGD),
    "local sgd": lambda: cj.local_sgd(SGD, 2),
    "rows": lambda: cj.crossover_sgd(SGD, WORKERS, cut=cj.by_rows(7, align=2)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_every_algorithm_runs_under_strict_dtype_promotion(name, dtype):
    algorithm, x = ALL[name](), jnp.ones((WORKERS, 70), dtype)
    with jax.numpy_dtype_promotion("strict"):
        state = (x, cj.copies(algorithm.init(x[0]), WORKERS))
        cj.per_worker(lambda s, t: algorithm.update(s[0], s[1], s[0], t), WORKERS, (1,))(state, jnp.int32(0))


# --- optimizers


KEEPERS = {
    "schedule free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "schedule free adamw": lambda: optax.contrib.schedule_free_adamw(0.1),
    "in a chain": lambda: optax.chain(optax.clip(1.0), optax.contrib.schedule_free_sgd(0.1)),
}
OTHERS = {
    "adam": lambda: optax.adam(0.1),
    "lion": lambda: optax.lion(0.1),
    "prodigy, which remembers the first parameters": lambda: optax.contrib.prodigy(0.1),
    "lbfgs, which remembers the last ones": lambda: optax.lbfgs(linesearch=None),
    "adafactor": lambda: optax.adafactor(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
}


@pytest.mark.parametrize("name", KEEPERS)
def test_an_optimizer_that_moves_parameters_of_its_own_travels_whole_or_not_at_all(name):
    params, optimizer = {"w": jnp.ones((3, 20)), "b": jnp.ones(20)}, KEEPERS[name]()
    mix = cj.crossover(WORKERS)
    for make in (
        cj.mix_after,
        cj.mix_during,
        lambda o, m: cj.mix_relative(o, m, 3),
        lambda o, m: cj.sgp(o, WORKERS, pool=cj.topology.pull(WORKERS, 2).transpose()),
    ):
        with pytest.raises(ValueError, match=r"must not move parameters of its own, .*z/b' of its"):
            make(optimizer, mix).init(params)
        with pytest.raises(ValueError, match="use `mix_with_momentum`"):
            jax.jit(make(optimizer, mix).init)(params)
    algorithm = cj.mix_with_momentum(optimizer, cj.repeat(3, mix))
    grads = jax.tree.map(lambda x: jnp.broadcast_to(jnp.arange(8.0).reshape(8, *[1] * x.ndim), (8, *x.shape)), params)
    state, step = (
        cj.copies((params, algorithm.init(params)), WORKERS),
        cj.per_worker(lambda s, g, t: algorithm.update(g, s[1], s[0], t), WORKERS, (2,)),
    )
    apart = []
    for t in range(30):
        state = step(state, grads, jnp.int32(t))
        apart.append(float(cj.consensus_distance(state)))
    assert apart[-1] < 2 * max(apart[:10])


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_are_taken(name):
    cj.crossover_sgd(OTHERS[name](), WORKERS).init({"w": jnp.ones((3, 20)), "b": jnp.ones(20)})


FROZEN = {
    "masked": lambda: optax.masked(optax.adam(0.1), {"head": True, "body": False}),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.set_to_zero()}, {"head": "a", "body": "b"}
    ),
    "in a chain": lambda: optax.chain(
        optax.masked(optax.scale_by_adam(), {"head": True, "body": False}), optax.trace(0.9)
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_the_momentum_of_what_is_trained_travels_where_the_rest_is_frozen(name):
    params = {"head": {"w": jnp.ones(30), "b": jnp.ones(8)}, "body": {"w": jnp.ones(40)}}
    algorithm = cj.mix_with_momentum(FROZEN[name](), cj.average())
    grads = jax.tree.map(lambda x: jnp.broadcast_to(jnp.arange(8.0).reshape(8, *[1] * x.ndim), (8, *x.shape)), params)
    state = cj.copies((params, algorithm.init(params)), WORKERS)
    params, state = cj.per_worker(lambda s, g: algorithm.update(g, s[1], s[0], 0), WORKERS)(state, grads)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == (7 if name == "in a chain" else 4)
    for x in floats:
        np.testing.assert_allclose(x, np.tile(x[:1], (WORKERS, 1)), rtol=1e-6)  # all of it was averaged
    with pytest.raises(ValueError, match="must keep momentum in the shape of the parameters that it trains"):
        cj.mix_with_momentum(optax.masked(optax.sgd(0.1), {"head": True, "body": False}), cj.average()).init(params)


# --- loops


class Net(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.linear(x))


@nnx.jit
def nnx_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 3).mean())(model)
    optimizer.update(model, grads)
    return loss


def nnx_objects():
    model = Net()
    return model, nnx.Optimizer(model, cj.as_optax(cj.crossover_sgd(optax.sgd(0.1), WORKERS)), wrt=nnx.Param)


def test_a_step_that_updates_modules_in_place_is_refused_or_wrapped():
    x = np.random.default_rng(0).normal(size=(WORKERS, 5, 3)).astype(np.float32)
    ends = []
    for where in places():
        state = cj.copies(nnx_objects(), where)
        with pytest.raises(
            ValueError, match=r"changes \d+ leaves of its arguments in place, and they would be lost: .*in_place"
        ):
            cj.per_worker(nnx_step, where, donate=False)(*state, cj.split(x.reshape(-1, 3), where))
        with pytest.raises(ValueError, match=r"got a result without arrays: nothing would be kept.*in_place"):
            cj.per_worker(lambda *args: (nnx_step(*args), None)[1], where, donate=False)(
                *state, cj.split(x.reshape(-1, 3), where)
            )
        step = cj.per_worker(cj.in_place(nnx_step), where)
        names, before = flatten(state)[0], [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        for _ in range(3):
            state, loss = step(state, cj.split(x.reshape(-1, 3), where))
        assert loss.shape == (WORKERS,)
        assert step._cache_size() == 1
        ends.append([np.asarray(leaf) for leaf in jax.tree.leaves(state)])
        moved = {name: np.abs(b - a).max() for name, a, b in zip(names, before, ends[-1], strict=True)}
        assert min(v for name, v in moved.items() if "kernel" in name or "norm/mean" in name) > 1e-4, moved
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_that_a_step_changes_for_itself_is_no_loss():
    def step(x, batch):
        batch["image"] = batch.pop("image") / 255
        return x + batch["image"].sum()

    cj.per_worker(step, WORKERS)(jnp.zeros(WORKERS), {"image": jnp.ones((WORKERS, 2))})


@pytest.mark.parametrize("where", ["mesh", "simulated", "mesh, two devices each"])
def test_a_flat_batch_is_dealt_out(where):
    spec = P("data") if "two" in where else None
    where = WORKERS if where == "simulated" else mesh({"data": 2} if "two" in where else None)
    batch = {"x": np.arange(32 * 3.0).reshape(32, 3), "y": jnp.arange(32)}
    dealt = cj.split(batch, where, spec)
    for key in batch:
        np.testing.assert_array_equal(dealt[key], np.asarray(batch[key]).reshape(8, 4, *batch[key].shape[1:]))
    if not isinstance(where, int):
        assert dealt["x"].sharding.is_equivalent_to(NamedSharding(where, P("worker", *(spec or ()))), 3)
    with pytest.raises(
        ValueError, match=r"leaf 'x' must have a first dimension of examples that 8 workers divide, got shape \(30, 3\)"
    ):
        cj.split({"x": np.zeros((30, 3))}, where)
    with pytest.raises(
        ValueError,
        match=r"got shape \(32, 3\): deal a batch out with `split\(batch, workers\)`, which makes \[8, 4, 3\]",
    ):
        cj.per_worker(lambda x, b: x, where)(jnp.zeros(WORKERS), batch)
    with pytest.raises(ValueError, match="name the argument in `replicated`, and every worker gets a key of its own"):
        cj.per_worker(lambda x, b: x, where)(jnp.zeros(WORKERS), jax.random.key(0))


@pytest.mark.parametrize("where", ["mesh", "simulated"])
def test_keywords_static_arguments_and_several_donated_ones(where):
    where = mesh() if where == "mesh" else WORKERS

    def step(params, opt_state, batch, rate, train=True, name="sgd"):
        assert isinstance(train, bool)
        assert name == "sgd"
        return params - rate * batch, opt_state + (1 if train else 0)

    def arrays():
        fresh = jnp.ones(WORKERS), jnp.zeros(WORKERS), jnp.arange(8.0)
        return fresh if isinstance(where, int) else jax.device_put(fresh, NamedSharding(where, P("worker")))

    for replicated in ((3,), ("rate",)):
        run = cj.per_worker(step, where, replicated, static=("train", 5), donate=(0, "opt_state"))
        for call in (
            lambda p, o, b: run(p, o, b, 0.5, True, "sgd"),
            lambda p, o, b: run(p, o, batch=b, rate=0.5, train=True, name="sgd"),
            lambda p, o, b: run(p, o, b, rate=jnp.float32(0.5), train=True),
        ):
            p, o, b = arrays()
            new = call(p, o, b)
            np.testing.assert_array_equal(new[0], 1 - 0.5 * np.arange(8))
            np.testing.assert_array_equal(new[1], np.ones(8))
            assert p.is_deleted()
            assert o.is_deleted()
            assert not b.is_deleted()


def test_the_axis_may_have_any_name():
    where = cj.make_mesh(WORKERS, devices=jax.devices()[:WORKERS], axis="batch")
    tx = cj.as_optax(cj.sgp(SGD, WORKERS))

    def step(state):
        updates, inner = tx.update(jax.lax.pmean(state[0], "batch"), state[1], state[0])
        return optax.apply_updates(state[0], updates), inner

    ends = []
    for place in (where, WORKERS):
        state = cj.copies((jnp.ones(9), tx.init(jnp.ones(9))), place, axis="batch")
        ends.append(cj.per_worker(step, place, axis="batch")(state)[0])
    np.testing.assert_allclose(*ends, rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"`workers` must have an axis 'worker', got a mesh with axes .*'batch'.*: name its"
    ):
        cj.per_worker(step, where)


def test_specs_that_are_forgotten_are_asked_for():
    where = mesh({"fsdp": 2})
    params, specs = {"w": jnp.ones((16, 4))}, {"w": P("fsdp")}
    x = cj.copies(params, where, specs=specs)
    for make in (lambda **o: cj.crossover(WORKERS, **o), cj.average):
        with pytest.raises(ValueError, match=r"`specs` must tell how leaves lie inside a worker, whose state"):
            cj.per_worker(make(), where, (1,), out_specs=specs, donate=False)(x, jnp.int32(0))
        got = cj.per_worker(make(specs=specs), where, (1,), out_specs=specs, donate=False)(x, jnp.int32(0))
        np.testing.assert_allclose(got["w"], 1, rtol=1e-6)
    cj.per_worker(cj.crossover(WORKERS), where, (1,), donate=False)(cj.copies(params, where), jnp.int32(0))


def test_a_model_of_two_numbers_names_the_cut():
    with pytest.raises(
        ValueError,
        match=r"`cut` must make at most as many segments as elements travel .*, 2, but it makes 7: pass `cut=by_size",
    ):
        cj.per_worker(cj.crossover(WORKERS), WORKERS, (1,))({"a": jnp.zeros(8), "b": jnp.zeros(8)}, jnp.int32(0))


# --- old names


def test_old_names_work_for_one_version_and_warn():
    x = jnp.arange(8.0)
    for old, new in (
        ("latin", cj.topology.latin),
        ("Pool", cj.topology.Pool),
        ("mix_all", cj.mix_with_momentum),
        ("mean", cj.mean_over_workers),
        ("average_grads", cj.allreduce_sgd),
    ):
        with pytest.warns(DeprecationWarning, match=f"`crossover_jax.{old}` is the name of version 0.1: use"):
            assert getattr(cj, old) is new
    with pytest.raises(AttributeError, match="module 'crossover_jax' has no attribute 'lattin'"):
        cj.lattin  # noqa: B018 - to ask for the name is the test
    with pytest.raises(AttributeError, match="`lars` is no part of the library any more"):
        cj.lars  # noqa: B018 - to ask for the name is the test
    pool, table, cut = cj.topology.latin(8, 4), cj.topology.shuffle(4, 4), cj.by_size(4)
    y = jnp.arange(64.0).reshape(8, 8)
    with pytest.warns(DeprecationWarning, match="order of version 0.1"):
        old = cj.gossip(pool, table, cut)
    with pytest.warns(DeprecationWarning, match="pass `leaves`"):
        filtered = cj.average(where=lambda name: True)
    with pytest.warns(DeprecationWarning, match="compose `crossover"):
        during = cj.crossover_sgd(SGD, 8, during=True, rounds=2)
    step = lambda mix: cj.per_worker(mix, 8, (1,), donate=False)(y, jnp.int32(0))
    np.testing.assert_array_equal(step(old), step(cj.gossip(pool, cut, table)))
    np.testing.assert_array_equal(step(filtered), step(cj.average()))
    same = cj.mix_during(SGD, cj.repeat(2, cj.crossover(8)))
    moved = [cj.per_worker(lambda y, a=a: a.update(y, a.init(y), y, 0)[0], 8, donate=False)(y) for a in (during, same)]
    np.testing.assert_array_equal(*moved)
    with pytest.warns(DeprecationWarning, match="pass `workers`"):
        assert cj.copies(x, where=2).shape == (2, 8)
