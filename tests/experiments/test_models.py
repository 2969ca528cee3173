import math
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from crossover_jax.leaves import flatten
from experiments.models import MODELS, apply, build, coarse, fine, recalibrate
from experiments.models.mlp import MLP
from experiments.models.norm import BatchNorm, GroupNorm
from experiments.models.resnet import small_resnet

SHAPES = {"resnet18": ((224, 224, 3), 1000), "resnet34": ((224, 224, 3), 1000), "resnet50": ((224, 224, 3), 1000)}
WORKERS, BATCH, IMAGE = 2, 4, (8, 8, 1)

# Published: the segments of arXiv:2012.15198, sizes computed from the architecture.
FINE = {
    "stem": 9_536,
    "layer1/0": 75_008,
    **{f"layer1/{k}": 70_400 for k in (1, 2)},
    "layer2/0": 379_392,
    **{f"layer2/{k}": 280_064 for k in (1, 2, 3)},
    "layer3/0": 1_512_448,
    **{f"layer3/{k}": 1_117_184 for k in (1, 2, 3, 4, 5)},
    "layer4/0": 6_039_552,
    **{f"layer4/{k}": 4_462_592 for k in (1, 2)},
    "fc": 2_049_000,
}
COARSE = {
    "stem": 9_536,
    "layer1": 215_808,
    "layer2": 1_219_584,
    "layer3": 7_098_368,
    "layer4": 14_964_736,
    "fc": 2_049_000,
}


def abstract(name, **options):
    """What `build` returns, but only the shapes of the arrays."""
    image_shape, num_classes = SHAPES.get(name, ((32, 32, 3), 10))
    graphdefs = []

    def arrays():
        graphdef, *rest = build(name, num_classes=num_classes, image_shape=image_shape, seed=0, **options)
        graphdefs.append(graphdef)
        return rest

    params, state = jax.eval_shape(arrays)
    return graphdefs[0], params, state


def sizes(params):
    """Number of values by parameter name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape) for path, leaf in leaves}


def small(norm="batch", **options):
    return build("resnet8", num_classes=3, image_shape=IMAGE, seed=0, width=4, norm=norm, **options)


def pictures(*leading, seed=0):
    return np.random.default_rng(seed).normal(size=(*leading, *IMAGE)).astype(np.float32)


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), a, b)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet50", 25_557_032),
        ("resnet34", 21_797_672),
        ("resnet18", 11_689_512),
        ("mlp", 3072 * 256 + 256 + 256 * 10 + 10),
    ],
)
def test_parameter_count_is_the_published_one(name, count):
    assert sum(sizes(abstract(name)[1]).values()) == count


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("depth", [8, 20, 56])
def test_small_resnet_has_the_count_of_its_formula(depth, norm):
    w, n = 16, (depth - 2) // 6
    stage = [(9 * a * b + 2 * b) + (9 * b * b + 2 * b) * (2 * n - 1) for a, b in ((w, w), (w, 2 * w), (2 * w, 4 * w))]
    projections = sum(a * 2 * a + 2 * 2 * a for a in (w, 2 * w))
    expected = 27 * w + 2 * w + sum(stage) + projections + 4 * w * 10 + 10
    assert sum(sizes(abstract(f"resnet{depth}", norm=norm)[1]).values()) == expected
    assert depth != 20 or expected == 272_474


@pytest.mark.parametrize(("segment", "table"), [(fine, FINE), (coarse, COARSE)])
def test_segments_of_resnet50_are_the_published_ones(segment, table):
    counts = Counter()
    for name, size in sizes(abstract("resnet50")[1]).items():
        counts[segment(name)] += size
    assert counts == table


@pytest.mark.parametrize("name", MODELS)
def test_segments_are_runs_of_neighbouring_leaves(name):
    labels = [fine(leaf) for leaf in sizes(abstract(name)[1])]
    changes = sum(a != b for a, b in pairwise(labels))
    assert changes + 1 == len(set(labels))


@pytest.mark.parametrize(("name", "billions"), [("resnet18", 1.81), ("resnet34", 3.66), ("resnet50", 4.09)])
def test_multiplications_are_those_torchvision_publishes(name, billions):
    graphdef, *shapes = abstract(name)
    images = jax.ShapeDtypeStruct((1, *SHAPES[name][0]), np.float32)
    run = jax.make_jaxpr(lambda p, s, x: apply(graphdef, p, s, x, train=False, key=None)[0])(*shapes, images)
    assert round(multiplications(run.jaxpr) / 1e9, 2) == billions


def multiplications(jaxpr):
    """Of convolutions (kernels `[h, w, in, out]`) and of one example's matrix product `[1, in] @ [in, out]`."""
    operations = [(e.primitive.name, e.invars[-1].aval.shape, e.outvars[0].aval.shape) for e in jaxpr.eqns]
    convolutions = sum(math.prod(k) * y[1] * y[2] for name, k, y in operations if name == "conv_general_dilated")
    return convolutions + sum(math.prod(k) for name, k, _ in operations if name == "dot_general")


def test_weights_are_he_uniform():
    _, params, _ = build("mlp", num_classes=10, image_shape=(28, 28, 1), seed=0)
    kernel = np.asarray(params["layers"][0]["kernel"])
    assert np.abs(kernel).max() <= math.sqrt(6 / 784)
    np.testing.assert_allclose(kernel.std(), math.sqrt(2 / 784), rtol=0.01)


@pytest.mark.parametrize("zero_init", [False, True])
def test_zero_init_makes_last_scales_zero(zero_init):
    _, params, _ = small(zero_init=zero_init)
    assert (np.asarray(params["layer1"][0]["norm2"]["scale"]) == (not zero_init)).all()
    assert (np.asarray(params["layer1"][0]["norm1"]["scale"]) == 1).all()


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_batch_norm_is_its_formula(groups):
    x = np.random.default_rng(0).normal(2, 3, (6, 5, 5, 4)).astype(np.float32)
    layer = BatchNorm(4, groups=groups)
    scale, bias = np.arange(1, 5.0), np.arange(4.0)
    layer.scale.set_value(jnp.asarray(scale, jnp.float32))
    layer.bias.set_value(jnp.asarray(bias, jnp.float32))
    y = layer(jnp.asarray(x), True)
    parts = np.split(x.astype(np.float64), groups)
    means, variances = (np.array([getattr(part, f)((0, 1, 2)) for part in parts]) for f in ("mean", "var"))
    expected = [(p - m) / np.sqrt(v + 1e-5) * scale + bias for p, m, v in zip(parts, means, variances, strict=True)]
    close(y, np.concatenate(expected), atol=1e-4)
    mean, var = 0.1 * means.mean(0), 0.9 + 0.1 * variances.mean(0)
    close((layer.mean[...], layer.var[...]), (mean, var))
    close(layer(jnp.asarray(x), False), (x - mean) / np.sqrt(var + 1e-5) * scale + bias, atol=1e-4)
    close((layer.mean[...], layer.var[...]), (mean, var))


def test_batch_norm_computes_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (64, 4)), jnp.bfloat16)
    layer = BatchNorm(4)
    assert layer(x, True).dtype == jnp.bfloat16
    close(layer.mean[...], 0.1 * np.asarray(x, np.float64).mean(0))


def test_group_norm_is_its_formula_and_independent_of_the_batch():
    x = np.random.default_rng(0).normal(2, 3, (6, 5, 5, 16)).astype(np.float32)
    y = GroupNorm(16)(jnp.asarray(x), True)
    groups = x.astype(np.float64).reshape(6, 25, 4, 4)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    close(y, expected.reshape(x.shape), atol=1e-4)
    close(GroupNorm(16)(jnp.asarray(x[:1]), False), y[:1])


@pytest.mark.parametrize(
    ("name", "options", "kinds"),
    [("mlp", {"dropout": 0.5}, set()), ("resnet8", {}, {"mean", "var"}), ("resnet8", {"norm": "group"}, set())],
)
def test_model_state_holds_only_statistics(name, options, kinds):
    _, _, state = abstract(name, **options)
    assert {leaf.split("/")[-1] for leaf in sizes(state)} == kinds
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state))


def test_dropout_follows_the_key_and_evaluation_needs_none():
    graphdef, params, state = build("mlp", num_classes=3, image_shape=IMAGE, seed=0, hidden=(32, 16), dropout=0.5)
    x = pictures(BATCH)

    def logits(seed, train=True):
        return np.asarray(apply(graphdef, params, state, x, train=train, key=seed and jax.random.key(seed))[0])

    np.testing.assert_array_equal(logits(1), logits(1))
    assert (logits(1) != logits(2)).any()
    np.testing.assert_array_equal(logits(1, train=False), logits(None, train=False))
    hidden = x.reshape(BATCH, -1).astype(np.float64)
    for layer in (params["layers"][0], params["layers"][1]):
        hidden = np.maximum(hidden @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 0)
    close(logits(None, train=False), hidden @ np.asarray(params["fc"]["kernel"]))
    with pytest.raises(ValueError, match=r"`key` must be given to train with `dropout` 0\.5, got None"):
        logits(None)


def test_dropout_keeps_the_expectation():
    model = MLP((4, 20_000, 1), dropout=0.25, rngs=nnx.Rngs(0))
    model.fc.kernel.set_value(jnp.ones((20_000, 1)) / 20_000)
    x = jnp.ones((1, 4))
    dropped, kept = model(x, train=True, key=jax.random.key(1)), model(x, train=False, key=None)
    np.testing.assert_allclose(dropped, kept, rtol=0.03)


def test_bfloat16_computes_in_bfloat16_from_float32_parameters():
    graphdef, params, state = small(dtype="bfloat16")
    run = jax.make_jaxpr(lambda p: apply(graphdef, p, state, pictures(BATCH), train=True, key=None))(params)
    convolutions = [e for e in run.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(convolutions) == 9
    assert {e.outvars[0].aval.dtype for e in convolutions} == {jnp.dtype("bfloat16")}
    assert {v.dtype for v in run.out_avals} == {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def worker_step(graphdef):
    """Training step of one worker: plain SGD, and logits, which show the dropout mask."""

    def step(params, state, x, y):
        key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("worker"))

        def loss(params):
            logits, new_state = apply(graphdef, params, state, x, train=True, key=key)
            return jnp.square(logits - y[:, None]).mean(), (logits, new_state)

        (value, (logits, new_state)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new_state, logits, value

    return step


def on_mesh(step):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(WORKERS, 2), ("worker", "device"), axis_types=(AxisType.Auto,) * 2)

    def one(*args):
        results = step(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], results)

    mapped = jax.shard_map(one, mesh=mesh, in_specs=P("worker"), out_specs=P("worker"), axis_names={"worker"})
    data = jax.sharding.NamedSharding(mesh, P("worker", "device"))
    return jax.jit(lambda p, s, x, y: mapped(p, s, *jax.lax.with_sharding_constraint((x, y), data)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"hidden": (32,), "dropout": 0.5}),
        pytest.param("resnet8", {"width": 4}, marks=pytest.mark.slow),
        ("resnet8", {"width": 4, "bn_groups": 2}),
    ],
)
def test_workers_on_a_mesh_are_workers_under_vmap(name, options):
    graphdef, params, state = build(name, num_classes=3, image_shape=IMAGE, seed=0, **options)
    params, state = jax.tree.map(lambda a: jnp.stack([a] * WORKERS), (params, state))
    x, y = pictures(1, BATCH).repeat(WORKERS, 0), np.ones((WORKERS, BATCH), np.float32)
    step = worker_step(graphdef)
    simulated = jax.jit(jax.vmap(step, axis_name="worker"))(params, state, x, y)
    close(on_mesh(step)(params, state, x, y), simulated)
    logits = np.asarray(simulated[2])
    assert (logits[0] != logits[1]).any() == ("dropout" in options)  # equal data: only masks can differ


def test_recalibrate_takes_the_statistics_of_all_batches_together():
    graphdef, params, state = small()
    batches = [pictures(BATCH, seed=seed) for seed in range(3)]
    got = recalibrate(forward_of(graphdef, params), jax.tree.map(lambda s: s + 5, state), batches)
    step = jax.jit(lambda x: apply(graphdef, params, state, x, train=True, key=None)[1])
    moved = [jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.1, step(x), state) for x in batches]
    names, leaves, _ = flatten(got)
    for name, leaf, *seen in zip(names, leaves, *map(jax.tree.leaves, moved), strict=True):
        if name.endswith("mean"):
            close(leaf, np.mean(seen, 0))
    kernel = np.asarray(params["stem"]["conv1"]["kernel"], np.float64)[:, :, 0]
    stem = [np.tensordot(windows(x), kernel, 2) for x in batches]
    close(got["stem"]["norm1"], {f: getattr(np.concatenate(stem), f)((0, 1, 2)) for f in ("mean", "var")})


def forward_of(graphdef, params):
    return lambda state, x: apply(graphdef, params, state, x, train=True, key=None)[1]


def windows(images):
    """Every 3x3 neighbourhood of single-channel images: `[batch, height, width, 3, 3]`."""
    padded = np.pad(images[..., 0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))


def test_recalibrate_leaves_a_model_without_statistics():
    graphdef, params, state = small(norm="group")
    assert recalibrate(forward_of(graphdef, params), state, []) == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("resnet9", num_classes=3, image_shape=IMAGE, seed=0), "`name` must be one of mlp, .*'resnet9'"),
        (lambda: small_resnet(depth=10, num_classes=3, image_shape=IMAGE, rngs=nnx.Rngs(0)), "6n \\+ 2.* got 10"),
        (lambda: small(norm="layer"), "`norm` must be 'batch' or 'group', got 'layer'"),
        (lambda: small(norm="group", bn_groups=2), "`bn_groups` must be .* got 2 for 'group'"),
        (lambda: recalibrate(lambda state, x: state, small()[2], []), "`batches` must hold at least one batch"),
        (lambda: BatchNorm(4, groups=4)(jnp.ones((6, 4)), True), "must divide the worker's batch of 6, got 4"),
        (lambda: MLP((4,), rngs=nnx.Rngs(0)), "`sizes` must hold input and output"),
    ],
)
def test_errors_name_the_requirement(call, message):
    with pytest.raises(ValueError, match=message):
        call()
