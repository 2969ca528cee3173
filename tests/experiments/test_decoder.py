"""The decoder against numpy and a loop over layers, its text, and a run that learns."""

import math
import os
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from experiments import data, models, program, train
from experiments.configs import decoder as small
from experiments.configs import decoder_1b as large
from experiments.evaluate import make_evaluate
from experiments.models.decoder import layer, rms_norm
from experiments.optimizers import make_optimizer
from experiments.settings import check_settings
from experiments.step import TrainState, init_state, train_step

VOCABULARY, SEQUENCE = 12, 12
OPTIONS = {"num_layers": 3, "width": 16, "num_heads": 2, "mlp_width": 24}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, SEQUENCE), np.uint8)


def abstract(name, **how):
    """What `build` returns, but only the shapes of the arrays."""
    graphdefs = []

    def arrays():
        graphdef, *rest = models.build(name, seed=0, **how)
        graphdefs.append(graphdef)
        return rest

    params, state = jax.eval_shape(arrays)
    return graphdefs[0], params, state


@cache
def tiny(**options):
    """A decoder with numpy's parameters, norms at other than one, or forgetting them would not show."""
    graphdef, params, state = abstract("decoder", num_classes=VOCABULARY, image_shape=(SEQUENCE,), **OPTIONS | options)
    rng = np.random.default_rng(1)

    def values(path, leaf):
        noise = rng.normal(size=leaf.shape)
        norm = jax.tree_util.keystr(path, simple=True).endswith("norm")
        return (1 + 0.1 * noise if norm else 0.3 * noise).astype(leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(values, params), state


def large_shapes():
    config = large.get_config().lock()
    shape = (config.dataset.sequence,)
    return abstract(config.model.name, num_classes=256, image_shape=shape, **config.model.options)


def logits(tokens=TOKENS, **options):
    graphdef, params, state = tiny(**options)
    run = jax.jit(lambda p, x: models.apply(graphdef, p, state, x, train=True, key=None)[0])
    return np.asarray(run(params, tokens))


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# ---- the model ----


def in_numpy(params, tokens):
    """Logits of one sequence in float64, token by token and head by head."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    layers = params["layers"]
    num_layers, _, num_heads, size = layers["query"].shape

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + 1e-6) * scale

    def turned(x, position):
        """Rotary positions as complex numbers: feature i and i + d/2 are one, turned by its angle."""
        half = size // 2
        angle = position * 10_000.0 ** (-2 * np.arange(half) / size)
        turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag])

    x = params["embedding"][tokens]
    for i in range(num_layers):
        p = {name: value[i] for name, value in layers.items()}
        y = np.stack([norm(row, p["attention_norm"]) for row in x])
        x = x.copy()
        for h in range(num_heads):
            q, k = (np.stack([turned(row @ p[n][:, h], t) for t, row in enumerate(y)]) for n in ("query", "key"))
            v = y @ p["value"][:, h]
            for t in range(len(tokens)):
                score = np.exp([q[t] @ k[s] / math.sqrt(size) for s in range(t + 1)])
                x[t] += (score / score.sum()) @ v[: t + 1] @ p["out"][h]
        y = np.stack([norm(row, p["mlp_norm"]) for row in x])
        gate = y @ p["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ p["up"])) @ p["down"]
    return np.stack([norm(row, params["norm"]) for row in x]) @ params["head"]


def test_the_forward_pass_is_its_equations_in_numpy():
    _, params, _ = tiny()
    expected = np.stack([in_numpy(params, row) for row in TOKENS])
    np.testing.assert_allclose(logits(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_the_scan_is_a_loop_over_layers_and_so_are_its_gradients(remat):
    graphdef, params, state = tiny(remat=remat, num_layers=2)

    def scanned(params):
        return jnp.square(models.apply(graphdef, params, state, TOKENS, train=True, key=None)[0]).mean()

    def looped(params):
        x = params["embedding"][TOKENS]
        for i in range(2):
            x = layer(x, jax.tree.map(lambda p: p[i], params["layers"]))
        return jnp.square(rms_norm(x, params["norm"]) @ params["head"]).mean()

    got, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (scanned, looped))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4), got, expected)
    text = str(jax.make_jaxpr(jax.grad(scanned))(params))
    assert text.count("exp2 ") + text.count("exp ") <= 2 * (1 + remat)  # of the softmax, not one per layer
    assert ("remat" in text or "checkpoint" in text) == remat


def test_a_byte_changes_nothing_before_it_and_everything_from_it_on():
    tokens = np.tile(TOKENS[0], (SEQUENCE + 1, 1))
    at = np.arange(SEQUENCE)
    tokens[at, at] = (tokens[at, at] + 1) % VOCABULARY  # row t differs at t, the last row nowhere
    y = logits(tokens)
    changed = np.abs(y[:-1] - y[-1:]).max(-1)
    assert (changed[at[:, None] <= at] > 1e-4).all()
    assert (changed[at[:, None] > at] < 1e-6).all()


def test_bfloat16_computes_in_bfloat16_from_float32_parameters():
    graphdef, params, state = tiny(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    run = jax.make_jaxpr(lambda p: models.apply(graphdef, p, state, TOKENS, train=True, key=None)[0])(params)
    (scan,) = [e for e in run.jaxpr.eqns if e.primitive.name == "scan"]
    products = [e for e in scan.params["jaxpr"].jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) >= 7
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype("bfloat16")}
    assert [v.dtype for v in run.out_avals] == [jnp.float32]


def test_kernels_start_with_the_variance_of_their_fan_in():
    config = small.get_config()
    _, params, _ = models.build("decoder", num_classes=256, image_shape=(128,), seed=0, **config.model.options)
    width, mlp = config.model.options.width, config.model.options.mlp_width
    deep = 1 / math.sqrt(2 * config.model.options.num_layers)
    expected = dict.fromkeys(("query", "key", "value", "gate", "up"), 1 / math.sqrt(width))
    expected |= {"out": deep / math.sqrt(width), "down": deep / math.sqrt(mlp)}
    for name, std in expected.items():
        for of_layer in np.asarray(params["layers"][name]):
            np.testing.assert_allclose(of_layer.std(), std, rtol=0.03)
    first, second = np.asarray(params["layers"]["query"])[:2]
    assert (first != second).mean() > 0.99


def test_heads_that_do_not_cut_the_width_are_refused():
    with pytest.raises(
        ValueError, match="`num_heads` must cut `width` into heads of even size, got 3 and a width of 1"
    ):
        tiny(num_heads=3)
    with pytest.raises(ValueError, match="of even size, got 16 and a width of 16"):
        tiny(num_heads=16)


# ---- where its parameters lie ----


def test_the_large_config_has_the_parameters_of_its_formula():
    _, params, state = large_shapes()
    assert state == {}
    attention, mlp, norms = 4 * 2048 * 2048, 3 * 2048 * 5632, 2 * 2048
    expected = 20 * (attention + mlp + norms) + 2 * 256 * 2048 + 2048
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == expected == 1_028_737_024
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_big_leaves_of_the_large_config_can_be_split_over_16_by_4_devices():
    graphdef, params, state = large_shapes()
    specs = models.annotations(graphdef, params, state)
    assert jax.tree.structure(specs) == jax.tree.structure(params)
    sizes = {"fsdp": 16, "tensor": 4}
    for name, leaf in named(params).items():
        spec = named(specs)[name]
        if name.endswith("norm"):
            assert spec == P()
            continue
        assert sorted(filter(None, spec)) == (["fsdp"] if name == "head" else ["fsdp", "tensor"])
        for length, axis in zip(leaf.shape, spec, strict=True):
            assert length % sizes.get(axis, 1) == 0
    heads, mlp = (P(None, "fsdp", "tensor", None), P(None, "fsdp", "tensor"))
    for name, spec in specs["layers"].items():
        if name in ("query", "key", "value", "gate", "up"):
            assert spec == (heads if params["layers"][name].ndim == 4 else mlp)
    assert specs["layers"]["out"] == P(None, "tensor", None, "fsdp")
    assert specs["layers"]["down"] == P(None, "tensor", "fsdp")


@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_models_that_do_not_say_have_no_annotations(name):
    assert models.annotations(*abstract(name, num_classes=10, image_shape=(8, 8, 1))) is None


def test_workers_split_as_annotated_are_workers_under_vmap():
    graphdef, params, state = tiny()
    algorithm, workers = cj.allreduce_sgd(optax.sgd(0.1)), 2
    apply = program.make_apply(graphdef, data.describe("text", sequence=SEQUENCE))
    rng = np.random.default_rng(0)
    image = rng.integers(0, VOCABULARY, (workers, 4, SEQUENCE), np.uint8)
    batch = {"image": image, "label": rng.integers(0, VOCABULARY, image.shape, np.int32)}
    step = partial(train_step, loss_fn=partial(program.loss_fn, apply), algorithm=algorithm, seed=0)
    mesh = Mesh(
        np.array(jax.devices()[:8]).reshape(workers, 2, 2),
        ("worker", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, P("worker", *spec)))

    both = jax.tree.map(lambda x: np.stack([x] * workers), init_state(params, state, algorithm))
    split = both._replace(params=jax.tree.map(put, both.params, models.annotations(graphdef, params, state)))
    assert split.params["layers"]["query"].addressable_shards[0].data.shape == (1, 3, 8, 1, 8)
    share = jax.tree.map(lambda x: put(x, P("fsdp")), batch)
    simulate, distribute = (cj.per_worker(step, where, replicated=(2,), donate=False) for where in (workers, mesh))
    simulated, on_mesh = simulate(both, batch, np.int32(0)), distribute(split, share, np.int32(0))
    for run, tells in ((simulate, False), (distribute, True)):  # the compiler to gather parameters, not activations
        assert ("sharding_constraint" in str(jax.make_jaxpr(run)(both, batch, np.int32(0)))) == tells
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), *jax.device_get((on_mesh, simulated)))


# ---- the optimizer ----


def test_adamw_decays_matrices_but_not_the_scales_of_scanned_norms():
    config = small.get_config()
    config.schedule.update({"learning_rate": 0.1, "warmup": 0.0})
    config.adamw.weight_decay = 0.5
    _, params, _ = tiny()
    params = jax.tree.map(lambda p: p + 1, params)
    optimizer = make_optimizer(config, 10)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda p: optimizer.update(zero, optimizer.init(p), p))(params)
    for name, update in named(updates).items():
        decay = 0 if name.endswith("norm") else -0.1 * 0.5
        np.testing.assert_allclose(update, decay * np.asarray(named(params)[name]), rtol=1e-5)


def test_adamw_is_its_equations():
    config = small.get_config()
    config.schedule.update({"learning_rate": 0.1, "warmup": 0.0})
    config.adamw.update({"weight_decay": 0.0, "b1": 0.8, "b2": 0.9})
    optimizer = make_optimizer(config, 10)
    state, m, v = optimizer.init(jnp.zeros(1)), 0.0, 0.0
    for t, gradient in enumerate((1.0, -3.0, 0.5)):
        update, state = optimizer.update(jnp.full(1, gradient), state, jnp.zeros(1))
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        rate = 0.1 * (1 + math.cos(math.pi * t / 10)) / 2
        expected = -rate * m / (1 - 0.8 ** (t + 1)) / (math.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(update, [expected], rtol=1e-5)


def test_an_unknown_optimizer_is_refused():
    config = small.get_config()
    config.optimizer = "adam"
    with pytest.raises(
        ValueError,
        match=r"`config\.optimizer` must be one of sgd, lars, .*, oracle_adamw, muon, got 'adam', did you mean",
    ):
        check_settings(config)


# ---- text ----


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of three files, one of them deeper, written in another order than that of their names."""
    root = tmp_path_factory.mktemp("texts")
    (root / "b").mkdir()
    rng = np.random.default_rng(0)
    content = {name: rng.integers(0, 256, size, np.uint8).tobytes() for name, size in SIZES.items()}
    for name in reversed(content):
        (root / name).write_bytes(content[name])
    return root, content


SIZES = {"a.txt": 501, "b/c.txt": 300, "d.md": 200}


def test_windows_are_the_text_and_their_labels_the_next_bytes(texts):
    root, content = texts
    text = b"".join(content.values())
    parts = {"train+validation": text[:-100], "test": text[-100:]}  # of 1001 bytes
    for split, part in parts.items():
        dataset = data.load("text", split, data_dir=root, sequence=8)
        assert (dataset.num_classes, dataset.image_shape, dataset.label_shape) == (256, (8,), (8,))
        assert len(dataset) == (len(part) - 1) // 8
        for i, (image, label) in enumerate(zip(*dataset.source, strict=True)):
            assert image.tobytes() == part[8 * i : 8 * i + 8]
            assert bytes(label.tolist()) == part[8 * i + 1 : 8 * i + 9]
        assert (dataset.source.image.dtype, dataset.source.label.dtype) == (np.uint8, np.int32)


def test_what_arms_are_tuned_on_is_the_tenth_before_the_last_and_no_byte_of_it_is_trained_on(texts):
    root, content = texts
    text = b"".join(content.values())  # 1001 bytes: 801 for training, of which windows of 8 leave one to the next part
    train, held_out, both = (
        data.load("text", split, data_dir=root, sequence=8).source
        for split in ("train", "validation", "train+validation")
    )
    assert train.image.tobytes() == text[:800]
    assert held_out.image.tobytes() == text[800:896]  # the last of 901 bytes is a label only
    for name in ("image", "label"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(train, name), getattr(held_out, name)]), getattr(both, name)
        )


def test_a_file_a_pattern_and_a_slice_are_parts_of_the_folder(texts):
    root, content = texts

    def image(data_dir, split="train"):
        return data.load("text", split, data_dir=os.fspath(data_dir), sequence=8).source.image

    assert image(root / "d.md").tobytes() == content["d.md"][:160]  # of 200 bytes
    assert image(f"{root}/**/*.txt").tobytes() == (content["a.txt"] + content["b/c.txt"])[:640]
    whole, first, last = (image(root, f"train{part}") for part in ("", "[:90%]", "[90%:]"))
    np.testing.assert_array_equal(np.concatenate([first, last]), whole)
    assert len(last) == round(len(whole) / 10)
    assert np.shares_memory(whole, first)


def test_text_that_is_not_there_or_too_short_is_named(texts, tmp_path):
    root, _ = texts
    with pytest.raises(data.DataMissing, match=rf"No text in {tmp_path}/\*\.rst: `config.dataset.data_dir` must be a"):
        data.load("text", "train", data_dir=f"{tmp_path}/*.rst")
    with pytest.raises(ValueError, match="`split` must hold at least one example, got 'test'"):
        data.load("text", "test", data_dir=root, sequence=128)
    with pytest.raises(ValueError, match="`sequence` must be at least 1, got 0"):
        data.load("text", "train", data_dir=root, sequence=0)
    with pytest.raises(ValueError, match=r"Unknown split 'dev'. Should be one of \['train', 'validation', 'test'\]"):
        data.load("text", "dev", data_dir=root)


def text_batches(root, num_workers, num_steps=12, **kwargs):
    dataset = data.load("text", "train+validation", data_dir=root, sequence=8)
    batches = data.train_batches(dataset, batch_size=16, num_workers=num_workers, seed=0, augment=False, **kwargs)
    steps = [next(batches) for _ in range(num_steps)]  # of 112 examples: an epoch is 7 steps
    return {key: np.stack([step[key] for step in steps]) for key in ("image", "label")}


@pytest.mark.parametrize(("num_workers", "parts"), [(2, 1), (4, 2), (8, 4), (16, 16)])
def test_text_is_the_same_stream_for_every_number_of_workers_and_processes(texts, num_workers, parts):
    one = text_batches(texts[0], 1)
    local = num_workers // parts
    rows = [(slice(i * local, (i + 1) * local), slice(None)) for i in range(parts)]
    many = [text_batches(texts[0], num_workers, part=part) for part in rows]
    for key in one:
        stacked = np.concatenate([part[key] for part in many], axis=1)
        assert stacked.shape == (12, num_workers, 16 // num_workers, 8)
        np.testing.assert_array_equal(stacked.reshape(one[key].shape), one[key])
    np.testing.assert_array_equal(one["image"][..., 1:], one["label"][..., :-1])
    every = sorted(map(bytes, data.load("text", "train+validation", data_dir=texts[0], sequence=8).source.image))
    assert sorted(map(bytes, one["image"][:7].reshape(-1, 8))) == every


@pytest.mark.parametrize("name", ["text", "mnist"])
def test_batch_shapes_are_those_of_the_batches(name, texts):
    described = data.describe(name, sequence=8)
    if name == "text":
        batch = jax.tree.map(lambda x: x[0, 0], text_batches(texts[0], 4))
    else:
        zeros = data.Arrays(np.zeros((8, 28, 28, 1), np.uint8), np.zeros(8, np.int32))
        pretended = type(described)(**{**vars(described), "source": zeros})
        batch = jax.tree.map(lambda x: x[0], next(data.train_batches(pretended, batch_size=16, num_workers=4, seed=0)))
    assert data.batch_shapes(described, 4) == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def test_text_is_not_augmented(texts):
    dataset = data.load("text", "train", data_dir=texts[0], sequence=8)
    with pytest.raises(ValueError, match="`augment` must be False for text, got True"):
        data.train_batches(dataset, batch_size=16, num_workers=1, seed=0)


# ---- loss and evaluation ----


def test_evaluation_counts_every_byte_of_the_rows_that_count(texts):
    workers = 2
    algorithm = cj.allreduce_sgd(optax.sgd(0.1))
    dataset = data.load("text", "test", data_dir=texts[0], sequence=8)
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(workers, 256, 256)).astype(np.float32)  # a model that looks its logits up
    own = init_state({"table": tables[0]}, {}, algorithm)
    state = TrainState(
        {"table": jnp.asarray(tables)}, {}, jax.tree.map(lambda x: jnp.stack([x] * workers), own.algorithm)
    )
    evaluate = make_evaluate(lambda params, _, image: params["table"][image], algorithm, workers)
    batches = list(data.eval_batches(dataset, batch_size=5))
    assert not batches[-1]["mask"].all()
    found = evaluate(1, state, batches)

    def loss_and_accuracy(table):
        image, label = (x.reshape(-1).astype(int) for x in dataset.source)
        y = table.astype(np.float64)[image]
        losses = np.log(np.exp(y).sum(1)) - y[np.arange(len(label)), label]
        return losses.mean(), (y.argmax(1) == label).mean()

    loss, accuracy = loss_and_accuracy(tables.mean(0))
    assert found["eval/mean/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval/mean/accuracy"] == pytest.approx(accuracy, abs=1e-6)
    own = [loss_and_accuracy(table)[1] for table in tables]
    assert found["eval/workers/accuracy"] == pytest.approx(np.mean(own), abs=1e-6)
    assert found["eval/workers/accuracy_max"] == pytest.approx(max(own), abs=1e-6)


def test_no_more_than_two_batches_of_an_evaluation_are_under_way(monkeypatch):
    """With dozens, XLA:CPU starts the last device's part of a sum never: the process aborted on eight devices."""
    algorithm, events = cj.allreduce_sgd(optax.sgd(0.1)), []
    state = cj.copies(init_state({"table": jnp.zeros((256, 256))}, {}, algorithm), 2)
    evaluate = make_evaluate(lambda params, _, image: params["table"][image], algorithm, 2)
    wait = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: events.append(len(jax.tree.leaves(x))) or wait(x))

    def batches():
        for i in range(4):
            events.append(f"batch {i}")
            yield {"image": TOKENS, "label": TOKENS.astype(np.int32), "mask": np.ones(len(TOKENS), bool)}

    evaluate(1, state, batches())
    both = 6  # three sums of the averaged model, three of the workers' own
    assert events[:8] == ["batch 0", 0, "batch 1", both, "batch 2", both, "batch 3", both]


def test_the_loss_of_text_is_the_mean_over_all_bytes_and_they_are_not_normalised():
    graphdef, params, state = tiny()
    apply = program.make_apply(graphdef, data.describe("text"))
    label = (TOKENS.astype(np.int32) + 3) % VOCABULARY
    loss_fn = jax.jit(partial(program.loss_fn, apply))
    loss, (_, metrics) = loss_fn(params, state, {"image": TOKENS, "label": label}, jax.random.key(0))
    y = np.stack([in_numpy(params, row) for row in TOKENS])
    losses = np.log(np.exp(y).sum(-1)) - np.take_along_axis(y, label[..., None], -1)[..., 0]
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((y.argmax(-1) == label).mean())


@pytest.mark.slow
def test_a_short_run_learns_to_spell(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = small.get_config()
    config.dataset.update({"data_dir": os.fspath(folder), "sequence": 32, "eval_split": "test"})
    config.model.options.update({"num_layers": 2, "width": 32, "num_heads": 2, "mlp_width": 64})
    config.num_workers, config.batch_size, config.eval_batch_size, config.simulate = 2, 16, 8, "yes"
    config.steps, config.log_every, config.eval_every = 60, 1, 100.0
    config.schedule.learning_rate = 1e-2
    _, rows = train.train(config.lock(), tmp_path / "run")
    assert rows[-1]["epoch"] == pytest.approx(60 * 16 / (8099 // 32))  # the last tenth of 9000 bytes is the test split
    assert rows[0]["train/loss"] > math.log(256) - 0.5
    assert rows[-1]["eval/mean/loss"] < 0.5
    assert rows[-1]["eval/mean/accuracy"] > 0.85
