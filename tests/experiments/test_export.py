"""What `export` takes out of a checkpoint, and who can load it."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import crossover_jax as cj
from crossover_jax import topology
from experiments import algorithms, checkpoint, data, export, models, train
from experiments.configs import fashion_mnist
from experiments.program import make_program
from experiments.settings import as_json, versions
from experiments.step import Diverged

N, TRAINED, EVALUATED = 4, 600, 500


class Run(NamedTuple):
    workdir: pathlib.Path
    state: Any
    out: pathlib.Path  # its averaged model
    figures: export.Figures


def config_for(data_dir, **changes):
    """Four simulated workers, two steps of a small model, the checkpoints of steps 0, 1 and 2."""
    config = fashion_mnist.get_config()
    small = {"train_split": f"train[:{TRAINED}]", "eval_split": f"test[:{EVALUATED}]", "data_dir": os.fspath(data_dir)}
    config.dataset.update(small)
    config.model.name, config.model.options = "mlp", {"hidden": (32,)}
    config.num_workers, config.batch_size, config.steps, config.eval_batch_size = N, 64, 2, 160
    config.simulate, config.schedule.learning_rate = "yes", 0.02
    config.checkpoint.every, config.checkpoint.keep = 1, 3
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def mlp(data_dir, tmp_path_factory):
    workdir, out = tmp_path_factory.mktemp("mlp"), tmp_path_factory.mktemp("out") / "mlp"
    state, _ = train.train(config_for(data_dir), workdir)
    return Run(workdir, state, out, export.export(workdir, out))


@pytest.fixture(scope="module")
def resnet(data_dir, tmp_path_factory):
    """Exported with statistics over all its training examples, more being asked for than there are."""
    config = config_for(data_dir)
    config.model.name, config.model.options = "resnet8", {"width": 2, "stem_stride": 2, "bn_groups": 2}
    workdir, out = tmp_path_factory.mktemp("resnet"), tmp_path_factory.mktemp("out") / "resnet"
    state = leave(workdir, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "BATCH", 30)  # small ones differ among themselves
        return Run(workdir, state, out, export.export(workdir, out, examples=10**6))


def leave(workdir, config, change=lambda state: state):
    """A checkpoint such as a run leaves, of workers that differ by noise: cheaper than training."""
    own = config.dataset
    sets = [data.load(own.name, split, data_dir=own.data_dir) for split in (own.train_split, own.eval_split)]
    state = jax.device_get(cj.copies(make_program(config, sets[0], N, 1).init, N))
    rng = np.random.default_rng(0)
    noisy = lambda tree: jax.tree.map(lambda x: x + rng.uniform(0, 0.2, x.shape).astype(x.dtype), tree)
    state = change(state._replace(params=noisy(state.params), model_state=noisy(state.model_state)))
    record = {
        "config": as_json(config) | {"data": ", ".join(dataset.digest for dataset in sets)},
        "num_workers": N,
        "examples": 128,
        "provenance": versions(),
        "best": None,
    }
    with contextlib.closing(checkpoint.Checkpoints(workdir, 1)) as saves:
        saves.save(2, jax.device_put(state), record)
    return state


@pytest.fixture(scope="module")
def test_set(data_dir):
    return data.load("fashion_mnist", f"test[:{EVALUATED}]", data_dir=data_dir).source


def copy(run, tmp_path):
    return pathlib.Path(shutil.copytree(run.workdir, tmp_path / "copy"))


def saved(out):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(out / "model")


def pure(tree):
    """With the names that a checkpoint has, in float64."""
    if isinstance(tree, dict):
        return {str(name): pure(below) for name, below in tree.items()}
    return np.asarray(tree, np.float64)


def of_worker(tree, i):
    return jax.tree.map(lambda x: x[i], pure(tree))


def averaged(tree):
    return jax.tree.map(lambda x: x.mean(0), pure(tree))


def close(tree, expected, **tolerance):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-5, "atol": 1e-7} | tolerance), tree, expected
    )


# ---- oracles in numpy ----


def normalised(image):
    return (image / 255 - 0.2860) / 0.3530


def logits(params, image):
    hidden = normalised(image).reshape(len(image), -1) @ params["layers"]["0"]["kernel"] + params["layers"]["0"]["bias"]
    return np.maximum(hidden, 0) @ params["fc"]["kernel"] + params["fc"]["bias"]


def accuracy_and_loss(y, label):
    log_probability = y - np.log(np.exp(y).sum(1, keepdims=True))
    return (y.argmax(1) == label).mean(), -log_probability[np.arange(len(label)), label].mean()


def strided(image):
    """The 3x3 neighbourhoods of every second pixel of single-channel images: `[batch, height, width, 3, 3]`."""
    padded = np.pad(image[..., 0], ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]


def on_card(out):
    """{row: [cells]} of the tables of the card."""
    lines = [line.strip("| ").split(" | ") for line in (out / "README.md").read_text().splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines}


# ---- which model ----


def test_the_averaged_model_is_the_mean_of_the_workers_as_numpy_takes_it(mlp):
    tree = saved(mlp.out)
    assert {type(x) for x in jax.tree.leaves(tree)} == {np.ndarray}
    close(tree, {"params": averaged(mlp.state.params), "model_state": {}})
    with pytest.raises(AssertionError):
        close(tree["params"], of_worker(mlp.state.params, 0))


@pytest.mark.parametrize("i", [0, N - 1])
def test_a_worker_is_that_worker_bit_for_bit(i, mlp, tmp_path, test_set):
    figures = export.export(mlp.workdir, tmp_path / "out", workers=str(i))
    close(saved(tmp_path / "out")["params"], own := of_worker(mlp.state.params, i), rtol=0, atol=0)
    assert (figures.accuracy, figures.loss) == pytest.approx(
        accuracy_and_loss(logits(own, test_set.image), test_set.label)
    )


def test_what_push_sum_trains_is_exported_without_its_bias(data_dir, tmp_path, monkeypatch, test_set):
    def pushed(optimizer, n, params, specs, **keys):
        return cj.push_sum(optimizer, topology.pull(n, 3, 1).transpose(), cj.whole(), topology.cycle(1, 3), specs=specs)

    monkeypatch.setitem(algorithms.ALGORITHMS, "sgp", pushed)
    weights = np.array([0.5, 1.5, 0.75, 1.25], np.float32)

    def weighted(state):
        of_all = np.broadcast_to(weights, state.algorithm.weights.shape).copy()  # [workers, segments, workers]
        return state._replace(algorithm=state.algorithm._replace(weights=of_all))

    state = leave(tmp_path / "run", config_for(data_dir, algorithm="sgp"), weighted)
    figures = export.export(tmp_path / "run", tmp_path / "out")
    unbiased = jax.tree.map(lambda x: x / weights.reshape(-1, *[1] * (x.ndim - 1)), pure(state.params))
    mean = jax.tree.map(lambda x: x.mean(0), unbiased)
    close(saved(tmp_path / "out")["params"], mean)
    assert figures.accuracy == accuracy_and_loss(logits(mean, test_set.image), test_set.label)[0]
    with pytest.raises(AssertionError):
        close(mean, averaged(state.params), rtol=1e-2)


def test_sharded_workers_export_what_they_would_unsharded(data_dir, tmp_path):
    config = config_for(data_dir, inner__fsdp=2, simulate="auto")
    config.model.options = {"hidden": (128,)}
    state, rows = train.train(config, tmp_path / "run", devices=jax.devices()[: 2 * N])
    kernel = state.params["layers"][0]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 392, 128)
    figures = export.export(tmp_path / "run", tmp_path / "out")
    close(saved(tmp_path / "out"), {"params": averaged(jax.device_get(state.params)), "model_state": {}})
    assert (figures.accuracy, figures.loss) == pytest.approx(
        (rows[-1]["eval/mean/accuracy"], rows[-1]["eval/mean/loss"])
    )
    assert figures.workers["consensus_distance"] == pytest.approx(rows[-1]["consensus_distance"])


def test_the_step_is_the_last_the_best_or_the_one_that_was_asked_for(mlp, tmp_path, monkeypatch):
    first = models.build("mlp", num_classes=10, image_shape=(28, 28, 1), seed=0, hidden=(32,))[1]
    assert export.export(mlp.workdir, tmp_path / "0", step="0").step == 0
    close(saved(tmp_path / "0")["params"], pure(first))
    assert export.restore(mlp.workdir, "last").record["step"] == 2
    read_record = checkpoint.read_record
    monkeypatch.setattr(checkpoint, "read_record", lambda *args: read_record(*args) | {"best": [1, 0.9]})
    assert export.restore(mlp.workdir, "best").record["step"] == 1
    monkeypatch.setattr(checkpoint, "read_record", lambda *args: read_record(*args) | {"best": None})
    with pytest.raises(ValueError, match=r"must not be 'best' where .* has no evaluation up to step 2: name one"):
        export.restore(mlp.workdir, "best")


# ---- statistics ----


def test_new_statistics_are_those_of_all_examples_together(resnet, data_dir):
    tree = saved(resnet.out)
    close(tree["params"], averaged(resnet.state.params))
    image = data.load("fashion_mnist", f"train[:{TRAINED}]", data_dir=data_dir).source.image
    kernel = averaged(resnet.state.params)["stem"]["conv1"]["kernel"][:, :, 0]
    x = np.tensordot(strided(normalised(image)), kernel, 2)
    expected = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
    close(tree["model_state"]["stem"]["norm1"], expected, rtol=1e-4)
    how = "over 600 examples of `train[:600]` without augmentation, in 20 batches of 30"
    assert how in (resnet.out / "README.md").read_text()


@pytest.mark.slow
def test_new_statistics_of_every_layer_are_those_of_one_forward_pass(resnet, data_dir, monkeypatch):
    monkeypatch.setattr(export, "BATCH", TRAINED)
    image = data.load("fashion_mnist", f"train[:{TRAINED}]", data_dir=data_dir).source.image
    graphdef, _, like = models.build("resnet8", num_classes=10, image_shape=(28, 28, 1), seed=0, width=2, stem_stride=2)
    own, zero = cj.one_worker(resnet.state.params, 1), jax.tree.map(np.zeros_like, like)
    found, sizes = export.recalibrated(export.restore(resnet.workdir, "last"), own, zero, TRAINED)
    _, moved = models.apply(graphdef, own, zero, normalised(image).astype(np.float32), train=True, key=None)
    expected = jax.tree.map(lambda x: x / 0.1, moved)
    close(pure(found), pure(expected), rtol=1e-3, atol=1e-4)
    assert sizes == (1, TRAINED)


def test_statistics_can_be_the_averages_of_the_workers(resnet, tmp_path):
    figures = export.export(resnet.workdir, tmp_path / "out", batch_norm="average")
    close(saved(tmp_path / "out")["model_state"], averaged(resnet.state.model_state))
    assert figures.source == "computed from the checkpoint"
    assert "running statistics of training, averaged over the workers." in (tmp_path / "out" / "README.md").read_text()


# ---- the card ----


def test_the_card_has_the_figures_that_numpy_finds(mlp, test_set):
    mean = accuracy_and_loss(logits(averaged(mlp.state.params), test_set.image), test_set.label)
    workers = [
        accuracy_and_loss(logits(of_worker(mlp.state.params, i), test_set.image), test_set.label) for i in range(N)
    ]
    accuracies = [accuracy for accuracy, _ in workers]
    card = on_card(mlp.out)
    assert [float(x) for x in card["**this model**"]] == pytest.approx(mean, abs=5.1e-5)
    for name, found in {"mean": np.mean(accuracies), "min": min(accuracies), "max": max(accuracies)}.items():
        assert float(card[f"the workers, {name}"][0]) == pytest.approx(found, abs=5.1e-5)
    distances = [
        sum(((x - m) ** 2).sum() for x, m in zip(*map(jax.tree.leaves, trees), strict=True))
        for trees in ((of_worker(mlp.state.params, i), averaged(mlp.state.params)) for i in range(N))
    ]
    assert mlp.figures.workers["consensus_distance"] == pytest.approx(np.sqrt(np.mean(distances)), rel=1e-5)
    text = (mlp.out / "README.md").read_text()
    assert f"is {np.sqrt(np.mean(distances)):.4g}." in text
    assert "# mlp on fashion_mnist, trained by crossover" in text
    assert f"after step 2 (128 examples, {128 / TRAINED:.2f} epochs)" in text
    config = json.loads((mlp.out / "config.json").read_text())
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]) == config
    assert (config["model.options.hidden"], config["num_workers"]) == ([32], N)
    assert card["jax"] == [jax.__version__] * 2


def test_workers_are_evaluated_anew_where_the_run_did_not(mlp, tmp_path):
    workdir = copy(mlp, tmp_path)
    (workdir / "metrics.jsonl").unlink()
    without = export.export(workdir, tmp_path / "without")
    keys = [f"eval/workers/accuracy{end}" for end in ("", "_min", "_max")]
    assert [without.workers[key] for key in keys] == pytest.approx([mlp.figures.workers[key] for key in keys])
    assert ("from the run's" in mlp.figures.source, "from the checkpoint" in without.source) == (True, True)


# ---- who can load it ----

PLAIN_FLAX = """
    import importlib, os, re, sys

    class Blocked:
        def find_spec(self, name, *_):
            if name.split(".")[0] in ("crossover_jax", "experiments"):
                raise ImportError(f"{name} is not here")

    sys.meta_path.insert(0, Blocked())
    for name in ("crossover_jax", "experiments"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        raise AssertionError(name)

    import jax
    import numpy as np
    from flax import nnx

    class Perceptron(nnx.Module):
        def __init__(self, hidden, rngs):
            self.layers = nnx.List([nnx.Linear(784, hidden, rngs=rngs)])
            self.fc = nnx.Linear(hidden, 10, rngs=rngs)

        @nnx.jit
        def __call__(self, x):
            x = x.reshape(len(x), -1)
            for layer in self.layers:
                x = nnx.relu(layer(x))
            return self.fc(x)

    def conv(m, n, size, stride, rngs):
        return nnx.Conv(m, n, (size, size), strides=stride, padding=size // 2, use_bias=False, rngs=rngs)

    def norm(n, rngs):
        return nnx.BatchNorm(n, use_running_average=True, rngs=rngs)

    class Part(nnx.Module):
        def __init__(self, **modules):
            for name, module in modules.items():
                setattr(self, name, module)

    class Block(nnx.Module):
        def __init__(self, m, n, stride, rngs):
            self.conv1, self.norm1 = conv(m, n, 3, stride, rngs), norm(n, rngs)
            self.conv2, self.norm2 = conv(n, n, 3, 1, rngs), norm(n, rngs)
            self.shortcut = Part(conv=conv(m, n, 1, stride, rngs), norm=norm(n, rngs)) if m != n else None

        def __call__(self, x):
            y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
            return nnx.relu(y + (self.shortcut.norm(self.shortcut.conv(x)) if self.shortcut else x))

    class Residual(nnx.Module):
        def __init__(self, width, rngs):
            self.stem = Part(conv1=conv(1, width, 3, 2, rngs), norm1=norm(width, rngs))
            self.layer1 = nnx.List([Block(width, width, 1, rngs)])
            self.layer2 = nnx.List([Block(width, 2 * width, 2, rngs)])
            self.layer3 = nnx.List([Block(2 * width, 4 * width, 2, rngs)])
            self.fc = nnx.Linear(4 * width, 10, rngs=rngs)

        @nnx.jit
        def __call__(self, x):
            x = nnx.relu(self.stem.norm1(self.stem.conv1(x)))
            for layer in (self.layer1, self.layer2, self.layer3):
                x = layer[0](x)
            return self.fc(x.mean((1, 2)))

    def load(folder, model):
        os.chdir(folder)
        lines = re.search(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1]
        names = {"model": model, "images": np.load(test)["image"]}
        exec(lines, names)
        return names["logits"]

    mlp, resnet, test, out = sys.argv[1:]
    found = {"mlp": load(mlp, Perceptron(32, nnx.Rngs(7))), "resnet": load(resnet, Residual(2, nnx.Rngs(7)))}
    for wrong in (Perceptron(33, nnx.Rngs(7)), Residual(2, nnx.Rngs(7))):
        try:
            load(mlp, wrong)
        except ValueError:
            continue
        raise AssertionError("another model was loaded")
    np.savez(out, **found)
"""


@pytest.mark.usefixtures("compiled_alike")
def test_plain_flax_loads_it_where_nothing_of_ours_can_be_imported(mlp, resnet, tmp_path, test_set):
    for run in (mlp, resnet):
        shutil.copytree(run.out, tmp_path / run.out.name)
    np.savez(tmp_path / "test.npz", **test_set._asdict())
    (tmp_path / "reader.py").write_text(textwrap.dedent(PLAIN_FLAX))
    names = ("reader.py", "mlp", "resnet", "test.npz", "logits.npz")
    read = subprocess.run(
        [sys.executable, "-I", *(str(tmp_path / name) for name in names)],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0, read.stderr
    found = np.load(tmp_path / "logits.npz")
    expected = logits(averaged(mlp.state.params), test_set.image)
    np.testing.assert_allclose(found["mlp"], expected, rtol=1e-3, atol=1e-4)
    for run in (mlp, resnet):
        of_reader = accuracy_and_loss(found[run.out.name].astype(np.float64), test_set.label)
        assert of_reader == pytest.approx((run.figures.accuracy, run.figures.loss), rel=1e-4)
        assert on_card(run.out)["**this model**"] == [f"{run.figures.accuracy:.4f}", f"{run.figures.loss:.4f}"]


def test_the_command_exports_and_ends_with_a_table(mlp, tmp_path, capsys):
    export.main([str(mlp.workdir), str(tmp_path / "new" / "out")])
    table = dict(re.findall(r"^(\S.*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert table["exported"] == f"step 2 to {tmp_path / 'new' / 'out'}"
    assert table["accuracy"] == f"{mlp.figures.accuracy:.4f}"
    close(saved(tmp_path / "new" / "out"), saved(mlp.out), rtol=0, atol=0)


# ---- what is refused ----


def damage(workdir, step):
    """Flip a bit of the largest file of its arrays."""
    path = max(
        (p for p in (workdir / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()), key=os.path.getsize
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoints_are_refused_by_number_and_stepped_over_as_the_last(mlp, tmp_path, capsys):
    workdir = copy(mlp, tmp_path)
    damage(workdir, 2)
    with pytest.raises(
        export.Damaged, match=r"^the checkpoint of step 2 in .*copy is damaged: .*; name another --step\."
    ):
        export.export(workdir, tmp_path / "out", step="2")
    assert not (tmp_path / "out").exists()
    figures = export.export(workdir, tmp_path / "out")
    assert figures.step == 1
    assert "WARNING: the checkpoint of step 2" in capsys.readouterr().out
    assert "after step 1 (64 examples" in (tmp_path / "out" / "README.md").read_text()
    for step in (0, 1):
        (workdir / "checkpoints" / str(step) / "record" / "metadata").write_text("{}")
    with pytest.raises(export.Damaged, match=r"`WORKDIR` must hold a whole checkpoint, got .* all 3 are damaged\.$"):
        export.restore(workdir, "last")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step=7"], "`--step` must be 'last', 'best' or a checkpoint of .*, 0, 1, 2, got 7."),
        (["--step=-1"], "`--step` must be 'last', 'best' or a checkpoint of .*, got -1."),
        (["--step=first"], "`--step` must .*, got first."),
        (["--workers=4"], "`--workers` must be 'mean' or from 0 to 3, got 4."),
        (["--workers=-1"], "`--workers` must be 'mean' or the number of a worker, got '-1'."),
        (["--examples=0"], "`--examples` must be at least 1, got 0."),
        (["--examples=some"], "argument --examples: invalid int value: 'some'; --help tells more."),
        (["--batch_norm=none"], "argument --batch_norm: invalid choice: 'none' .*; --help tells more."),
        (["more"], "unrecognized arguments: more; --help tells more."),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_one_line(flags, message, mlp, tmp_path):
    with pytest.raises(SystemExit) as error:
        export.main([str(mlp.workdir), str(tmp_path / "out"), *flags])
    assert re.fullmatch(f"error: {message}", error.value.code)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_left_as_it_is(mlp, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"`OUT` must be a new or an empty folder, got .*full, which is not empty"):
        export.export(mlp.workdir, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    with pytest.raises(ValueError, match=r"`OUT` must be a folder that can be written, got .*mine: Not a directory\.$"):
        export.export(mlp.workdir, tmp_path / "full" / "mine")
    (tmp_path / "empty").mkdir()
    export.export(mlp.workdir, tmp_path / "empty")
    assert {p.name for p in (tmp_path / "empty").iterdir()} == {"model", "README.md", "config.json"}


def test_what_fails_on_the_way_leaves_nothing(mlp, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full)
    with pytest.raises(
        ValueError, match=r"`OUT` must be a folder that can be written, got .*: No space left on device\."
    ):
        export.export(mlp.workdir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_data_are_refused(mlp, tmp_path, monkeypatch):
    load = data.load

    def other(name, split, **kwargs):
        return load(name, split.replace("test", "train"), **kwargs)

    monkeypatch.setattr(export.data, "load", other)
    with pytest.raises(
        ValueError, match=r"^`--data_dir` must hold the data of the run, fashion_mnist.*, got .*train\[:5"
    ):
        export.export(mlp.workdir, tmp_path / "out", data_dir=None)


@pytest.mark.parametrize(
    "error",
    [data.DataMissing("not here"), Diverged("evaluation loss"), export.Damaged("step 2"), ValueError("`x`")],
    ids=repr,
)
def test_a_mistake_is_a_sentence(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(export, "export", fail)
    with pytest.raises(SystemExit, match=f"^error: {error}$"):
        export.main(["run", str(tmp_path)])


def test_the_command_refuses_a_folder_without_checkpoints(tmp_path):
    command = [sys.executable, export.__file__, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"error: `WORKDIR` must hold the checkpoints of a run, got {tmp_path} without any: name a run's folder."
    ]
