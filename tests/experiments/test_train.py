"""`train` end to end, on the real Fashion-MNIST."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import crossover_jax as cj
from crossover_jax import topology
from experiments import (
    data,
    flags,
    models,
    program,
    report,
    train,
)
from experiments.algorithms import ALGORITHMS, make_algorithm
from experiments.optimizers import NoteState, make_optimizer, make_schedule
from experiments.settings import check_settings
from experiments.step import Diverged
from tests.experiments.helpers import BATCH, STEPS, arguments, changed, read_rows, scalars, small_config

ROOT = pathlib.Path(__file__).parents[2]
N = 8
TRAIN_KEYS = {"step", "epoch", "train/loss", "train/accuracy", "examples_per_second", "wire_bytes_per_step"}
EVAL_KEYS = {
    "eval/mean/accuracy",
    "eval/mean/loss",
    "eval/workers/accuracy",
    "eval/workers/accuracy_min",
    "eval/workers/accuracy_max",
    "consensus_distance",
}


@pytest.fixture
def config(data_dir):
    return small_config(data_dir)


def check_picture(path):
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.width > 1000, picture.height > 300) == ("PNG", True, True)


# ---- oracles in numpy ----


def logits(params, image):
    x = (image.reshape(len(image), -1) / 255 - 0.2860) / 0.3530
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    hidden = np.maximum(x @ params["layers"][0]["kernel"] + params["layers"][0]["bias"], 0)
    return hidden @ params["fc"]["kernel"] + params["fc"]["bias"]


def accuracy_and_loss(params, image, label):
    y = logits(params, image)
    log_probability = y - np.log(np.exp(y).sum(1, keepdims=True))
    return (y.argmax(1) == label).mean(), -log_probability[np.arange(len(label)), label].mean()


def evaluation(params, image, label):
    """What `metrics.jsonl` must hold for the workers' parameters."""
    workers = [jax.tree.map(lambda p: p[i], params) for i in range(N)]
    mean = jax.tree.map(lambda p: np.asarray(p, np.float64).mean(0), params)
    accuracy = [accuracy_and_loss(own, image, label)[0] for own in workers]
    distances = [
        sum(((p - m) ** 2).sum() for p, m in zip(*map(jax.tree.leaves, (w, mean)), strict=True)) for w in workers
    ]
    mean_accuracy, mean_loss = accuracy_and_loss(mean, image, label)
    return {
        "eval/mean/accuracy": mean_accuracy,
        "eval/mean/loss": mean_loss,
        "eval/workers/accuracy": np.mean(accuracy),
        "eval/workers/accuracy_min": min(accuracy),
        "eval/workers/accuracy_max": max(accuracy),
        "consensus_distance": math.sqrt(np.mean(distances)),
    }


SEGMENTS = (32 * 10 + 10, 784 * 32 + 32)  # parameters of "fc" and "layers/0"
MODEL_BYTES = 4 * sum(SEGMENTS)


def pulled(sizes):
    """Bytes sent without load balancing: in each round one message per worker and permutation that somebody wants."""
    pool, table = topology.pull(N, 16, 0), topology.sample(len(sizes), 16, seed=0)
    moved = (pool.receive_from != np.arange(N)) & pool.share[:, 1:].any(-1, keepdims=True)  # [rounds, peers, workers]
    messages = moved.sum((1, 2)) / N
    return np.mean([sum(4 * size * messages[p] for size, p in zip(sizes, table[t], strict=True)) for t in range(8)])


WIRE_BYTES = {
    "alone": lambda: 0,
    "allreduce": lambda: 2 * (N - 1) / N * MODEL_BYTES,
    "local_sgd": lambda: 2 * (N - 1) / N * MODEL_BYTES,
    "d_psgd": lambda: 2 * MODEL_BYTES,  # both neighbours
    "sgp": lambda: MODEL_BYTES,
    "crossover": lambda: 4 * 7 * math.ceil(sum(SEGMENTS) / 7),  # 7 equal segments, the last one padded
    "crossover_phases": lambda: 4 * 3 * math.ceil(sum(SEGMENTS) / 3),
    "crossover_paper": lambda: MODEL_BYTES,
    "outer": lambda: 4 * 7 * math.ceil(sum(SEGMENTS) / 7) / 16,  # after each 16 steps
    "noloco": lambda: 2 * MODEL_BYTES / 16,  # φ and φ − θ after each 16 steps
    "des_loc": lambda: 4 * 7 * math.ceil(sum(SEGMENTS) / 7) * (1 + 1 / 3 + 1 / 6),  # and both moments of AdamW
    "crossover_no_balance": lambda: pulled(SEGMENTS),
    "crossover_no_segments": lambda: MODEL_BYTES,
    "crossover_neither": lambda: pulled([sum(SEGMENTS)]),
}
ABLATIONS = {  # of "crossover_paper"
    "crossover_no_balance": {"load_balanced": False},
    "crossover_no_segments": {"segments": 1},
    "crossover_neither": {"load_balanced": False, "segments": 1},
}
IN_AGREEMENT = ("allreduce", "local_sgd")  # after each step, with `local_steps` 1


# ---- what a run leaves behind ----


def algorithm_keys(name):
    """What of the config makes an algorithm or an ablation of the paper's."""
    own = {f"crossover_paper.{key}": value for key, value in ABLATIONS.get(name, {}).items()}
    optimizer = {"optimizer": "adamw"} if name == "des_loc" else {}
    return {"algorithm": "crossover_paper" if own else name, **own, **optimizer}


def test_all_algorithms_are_here():
    assert WIRE_BYTES.keys() - ABLATIONS.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("name", WIRE_BYTES)
def test_every_algorithm_sends_so_many_bytes(name, config):
    config = changed(config, **algorithm_keys(name))
    build = lambda: models.build("mlp", num_classes=10, image_shape=(28, 28, 1), seed=0, hidden=(32,))[1]
    params = jax.eval_shape(build)
    algorithm = make_algorithm(config, make_optimizer(config, STEPS), params)
    assert program.wire_bytes_per_step(algorithm, params, config) == pytest.approx(WIRE_BYTES[name]())


# Nobody hears anybody, gradients are averaged, segments go by channels, the model goes by a switch.
@pytest.mark.parametrize("name", ["alone", "allreduce", "crossover", "crossover_neither"])
def test_an_algorithm_trains_and_reports_what_numpy_finds(name, config, tmp_path, data_dir):
    config = changed(config, **algorithm_keys(name))
    state, rows = train.train(config, tmp_path)
    assert read_rows(tmp_path) == rows
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [set(row) for row in rows] == [TRAIN_KEYS, TRAIN_KEYS, TRAIN_KEYS | EVAL_KEYS]
    last = rows[-1]

    test = data.load("fashion_mnist", config.dataset.eval_split, data_dir=data_dir).source
    expected = evaluation(state.params, test.image, test.label)
    assert {key: last[key] for key in EVAL_KEYS} == pytest.approx(expected, rel=1e-5, abs=2e-5)
    assert last["eval/workers/accuracy_min"] <= last["eval/workers/accuracy"] <= last["eval/workers/accuracy_max"]
    assert (last["consensus_distance"] < 1e-5) == (name in IN_AGREEMENT)

    _, params, _ = models.build("mlp", num_classes=10, image_shape=(28, 28, 1), seed=0, hidden=(32,))
    train_set = data.load("fashion_mnist", "train", data_dir=data_dir)
    batch = next(data.train_batches(train_set, batch_size=BATCH, num_workers=1, seed=0, augment=False))
    first = accuracy_and_loss(params, batch["image"][0], batch["label"][0])
    assert (rows[0]["train/accuracy"], rows[0]["train/loss"]) == pytest.approx(first, rel=1e-5)
    assert last["train/loss"] < rows[0]["train/loss"]

    assert [row["wire_bytes_per_step"] for row in rows] == pytest.approx([WIRE_BYTES[name]()] * STEPS)
    assert [row["epoch"] for row in rows] == pytest.approx([step * BATCH / 60_000 for step in (1, 2, 3)])
    assert all(row["examples_per_second"] > 0 for row in rows)

    values = {(tag, row["step"]): value for row in rows for tag, value in row.items() if tag != "step"}
    assert scalars(tmp_path) == pytest.approx(values, rel=1e-6)
    check_picture(tmp_path / "curves.png")


def test_the_rows_are_means_over_their_steps_whenever_they_are_written(config, tmp_path):
    _, every = train.train(changed(config, steps=5), tmp_path / "every")
    sparse = changed(config, steps=5, log_every=2, eval_every=2.5 * BATCH / 60_000)
    _, some = train.train(sparse, tmp_path / "some")
    assert [row["step"] for row in some] == [2, 3, 4, 5]  # evaluated at 2.5 and 5
    assert [row["step"] for row in some if "eval/mean/loss" in row] == [3, 5]
    for row, steps in zip(some, ([1, 2], [3], [4], [5]), strict=True):
        same = every[row["step"] - 1]
        assert row.keys() >= same.keys()
        for key in ("step", "epoch", "wire_bytes_per_step"):
            assert row[key] == same[key]
        for key in ("train/loss", "train/accuracy"):
            assert row[key] == pytest.approx(np.mean([every[step - 1][key] for step in steps]))


def test_a_step_is_waited_for_while_the_next_runs_and_metrics_are_read_for_rows_only(config, tmp_path, monkeypatch):
    events, made = [], []

    class Recorded:
        def __init__(self, step):
            self.step = step

        def lower(self, *args):
            self.compiled = self.step.lower(*args).compile()
            return self

        def compile(self):
            def run(state, batch, step):
                events.append(("run", int(jax.device_get(step)) + 1))
                state, metrics = self.compiled(state, batch, step)
                made.append(metrics)
                return state, metrics

            return run

    make_train_step, fetch, wait = program.make_train_step, train.fetch, jax.block_until_ready

    def waited(x):
        events.extend(("wait", i) for i, metrics in enumerate(made, 1) if any(metrics is y for y in x))
        return wait(x)

    monkeypatch.setattr(program, "make_train_step", lambda *a, **k: Recorded(make_train_step(*a, **k)))
    monkeypatch.setattr(train, "fetch", lambda first, m, *a: events.append(("read", first, len(m))) or fetch(first, m))
    monkeypatch.setattr(jax, "block_until_ready", waited)
    train.train(changed(config, log_every=2), tmp_path)
    assert events == [("run", 1), ("run", 2), ("wait", 1), ("read", 1, 2), ("run", 3), ("read", 3, 1)]


def test_a_hidden_transfer_in_the_loop_is_an_error(config, tmp_path, monkeypatch):
    part, place_batch, _ = program.placements(N)
    monkeypatch.setattr(program, "placements", lambda workers, period: (part, place_batch, lambda step: step))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train.train(config, tmp_path)


# ---- the same run, elsewhere ----


def comparable(rows):
    return [{key: value for key, value in row.items() if key != "examples_per_second"} for row in rows]


# Two devices per worker: with a cut at modules, because `by_size` cuts each device's own part.
@pytest.mark.parametrize(("name", "num_devices"), [("crossover", 8), ("crossover_paper", 16)])
def test_simulation_and_mesh_report_the_same(name, num_devices, config, tmp_path):
    config = changed(config, algorithm=name, eval_batch_size=160)
    _, simulated = train.train(config, tmp_path / "simulated")
    on_mesh = changed(config, simulate="auto")
    state, rows = train.train(on_mesh, tmp_path / "mesh", devices=jax.devices()[:num_devices])
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == num_devices
    for row, same in zip(comparable(rows), comparable(simulated), strict=True):
        assert row == pytest.approx(same, rel=1e-4, abs=1e-5)


def test_allreduce_of_eight_workers_is_one_worker_with_the_whole_batch(config, tmp_path):
    runs = [train.train(changed(config, algorithm="allreduce", num_workers=n), tmp_path / str(n))[1] for n in (8, 1)]
    for key in ("train/loss", "train/accuracy", "eval/mean/loss", "eval/workers/accuracy"):
        eight, one = ([row[key] for row in rows if key in row] for rows in runs)
        assert eight == pytest.approx(one, rel=1e-4)


def test_micro_batches_do_not_change_a_run_but_local_steps_do(config, tmp_path):
    changes = {"one": {}, "parts": {"micro_batches": 4}, "local": {"local_sgd.local_steps": 2}}
    rows = {}
    for name, change in changes.items():
        other = changed(config, algorithm="local_sgd", eval_every=BATCH / 60_000)
        other.update_from_flattened_dict(change)
        _, rows[name] = train.train(other, tmp_path / name)
    for row, same in zip(comparable(rows["parts"]), comparable(rows["one"]), strict=True):
        assert row == pytest.approx(same, rel=1e-4, abs=1e-5)
    assert [row["consensus_distance"] > 1e-5 for row in rows["local"]] == [True, False, True]
    assert rows["local"][0]["wire_bytes_per_step"] == pytest.approx((N - 1) / N * MODEL_BYTES)


# ---- what stops a run ----


def spoil(monkeypatch, at_step, spoiled):
    """Let `spoiled(batch)` happen to the batch of `at_step`."""
    train_batches = data.train_batches

    def batches(*args, **kwargs):
        for step, batch in enumerate(train_batches(*args, **kwargs), start=1):
            yield spoiled(batch) if step == at_step else batch

    monkeypatch.setattr(train.data, "train_batches", batches)


def unknown_class(batch):
    label = batch["label"].copy()
    label[5, 0] = 1_000_000  # its loss is NaN
    return batch | {"label": label}


def test_a_loss_that_is_nan_stops_the_run_and_leaves_what_was_written(config, tmp_path, monkeypatch):
    spoil(monkeypatch, 3, unknown_class)
    with pytest.raises(Diverged, match=r"^loss of worker 5 is nan at step 3 \(1 of 8 workers\): lower .*data\.$"):
        train.train(changed(config, steps=6), tmp_path)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    check_picture(tmp_path / "curves.png")
    assert {step for _, step in scalars(tmp_path)} == {1, 2}


def test_rows_are_written_at_once_and_an_interrupt_leaves_them(config, tmp_path, monkeypatch):
    def interrupt(batch):
        assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["start"], status["step"], status["num_steps"]) == (0, 3, 6)
        raise KeyboardInterrupt

    spoil(monkeypatch, 4, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.train(changed(config, steps=6), tmp_path)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
    check_picture(tmp_path / "curves.png")


def test_a_gradient_that_is_nan_stops_the_run_though_the_loss_is_finite(config, tmp_path, monkeypatch):
    @jax.custom_jvp
    def steep(x):
        return x

    @steep.defjvp
    def _(primals, tangents):
        return primals[0], tangents[0] * jnp.where(jax.lax.axis_index("worker") == 3, jnp.nan, 1)

    loss_fn = program.loss_fn

    def with_steep_loss(*args, **smoothing):
        loss, aux = loss_fn(*args, **smoothing)
        return steep(loss), aux

    monkeypatch.setattr(program, "loss_fn", with_steep_loss)
    with pytest.raises(Diverged, match=r"^grad_norm of worker 3 is nan at step 1 "):
        train.train(changed(config, algorithm="local_sgd"), tmp_path)


@pytest.mark.parametrize(
    ("steps", "message"),
    [(1, "^evaluation loss of worker 0 is (nan|inf) at step 1 "), (3, "^(loss|grad_norm) of worker 0 .* at step 2 ")],
)
def test_a_learning_rate_that_is_too_large_stops_the_run(steps, message, config, tmp_path):
    with pytest.raises(Diverged, match=message):
        train.train(changed(config, steps=steps, schedule__learning_rate=1e38), tmp_path)


def test_copies_that_differ_are_refused(config, tmp_path, monkeypatch):
    copies = cj.copies

    def perturbed(*args, **kwargs):
        return jax.tree.map(lambda x: x.at[2].add(1) if x.ndim == 3 else x, copies(*args, **kwargs))

    monkeypatch.setattr(train.cj, "copies", perturbed)
    with pytest.raises(
        ValueError, match=r"copies must start equal, but leaf '.*kernel' of worker 2 differs from worker 0"
    ):
        train.train(config, tmp_path)
    assert read_rows(tmp_path) == []


def test_an_earlier_run_is_not_written_over(config, tmp_path):
    with pytest.raises(ValueError, match="warmup"):
        train.train(changed(config, schedule__warmup=2.0), tmp_path)
    train.train(changed(config, steps=1), tmp_path)  # what never began is no earlier run
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"`workdir` must not hold the metrics\.jsonl of a run without .*: name"):
        train.train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(simulate="maybe"), "`config.simulate` must be 'auto', 'yes' or 'no', got 'maybe'"),
        (dict(steps=-1), "`config.steps` must be None or at least 1, got -1"),
        (dict(steps=None, epochs=0.0), "`config.epochs` must be positive where `config.steps` is None, got 0.0"),
        (dict(eval_every=0.0), "`config.eval_every` must be positive, got 0.0"),
        (dict(log_every=0), "`config.log_every` must be at least 1, got 0"),
        (dict(num_workers=0), "`config.num_workers` must be at least 1, got 0"),
        (dict(checkpoint__every=0), "`config.checkpoint.every` must be None or at least 1, got 0"),
        (dict(checkpoint__keep=0), "`config.checkpoint.keep` must be at least 1, got 0"),
        (dict(on_nan="go on"), "`config.on_nan` must be 'stop' or 'rollback', got 'go on'"),
        (dict(max_rollbacks=-1), "`config.max_rollbacks` must be at least 0, got -1"),
        (dict(micro_batches=0), "`config.micro_batches` must be at least 1, got 0"),
        (dict(crossover__local_steps=0), "`config.crossover.local_steps` must be at least 1, got 0"),
        (dict(algorithm="crosover"), "`config.algorithm` must .* got 'crosover', did you mean 'crossover'"),
        (dict(algorithm="adam"), r"`config.algorithm` must be one of .*, got 'adam'\.$"),
        (dict(model__name="mpl"), "`config.model.name` must be one of mlp, .* got 'mpl', did you mean 'mlp'"),
        (dict(model__name="resnet8"), "`config.model.options` must be among width, .* for resnet8, got hidden; "),
        (dict(dataset__name="fashionmnist"), "`config.dataset.name` must .* did you mean 'fashion_mnist'"),
        (dict(simulate="no", num_workers=128), "`config.num_workers` must divide the number of devices, 64, got 128: "),
        (dict(simulate="no"), "`config.eval_batch_size` must be a multiple of the 64 devices that share it, got 200"),
        (dict(simulate="no", inner__fsdp=3), "must divide the 8 devices of a worker, got 3 and 1"),
        (dict(inner__fsdp=2), "must be 1 where workers are simulated, got 2 and 1"),
        (dict(inner__tensor=0), "`config.inner.tensor` must be at least 1, got 0"),
        (dict(crossover__wire="int2"), "`config.crossover.wire` must be one of float32, .*, got 'int2'"),
        (dict(crossover__cut="columns"), "`config.crossover.cut` must be one of size, rows, got 'columns'"),
        (dict(clip_norm=0.0), "`config.clip_norm` must be None or positive, got 0.0"),
        (dict(schedule__cosine__end=1.5), "`config.schedule.cosine.end` must be from 0 to 1, got 1.5"),
        (dict(crossover__rounds=0), "`config.crossover.rounds` must be at least 1, got 0"),
        (dict(crossover__renew_every=0), "`config.crossover.renew_every` must be None or at least 1, got 0"),
        (dict(on_nan="rollback"), "`config.checkpoint.every` must be a number with --config.on_nan=rollback, got None"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_one_sentence(changes, message, config):
    config = changed(config, **changes)
    check = lambda: (check_settings(config), program.place_workers(config, jax.devices()))
    with pytest.raises(ValueError, match=message) as error:
        check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(log_every=0), "`config.log_every` must be at least 1, got 0"),
        (dict(simulate="no", num_workers=128), "`config.num_workers` must divide the number of devices, 64, got 128: "),
        (dict(micro_batches=3), "`micro_batches` must divide each worker's batch of 8, got 3"),
        (dict(batch_size=60), "`batch_size` must be a multiple of `num_workers`, got 60 and 8; .* 56 or 64"),
        (dict(crossover__during=True, crossover__renew_every=9), "at most one must be set, got during and renew_every"),
        (
            dict(crossover__during=True, crossover__local_steps=2),
            "`config.crossover.during` must be False .* and `local_",
        ),
        (
            dict(crossover__during=True, crossover__segments=13, crossover__pool_size=7),
            "`config.crossover.during` must be False where .* got 13 segments of a pool of 7 and `local_steps` 1: take",
        ),
        (dict(crossover__segments=30_000), "`cut` must make at most .*, 25450, but it makes 30000"),
        (dict(dataset__eval_split="tset"), "Unknown split 'tset'"),
        (dict(simulate="no", inner__tensor=8, eval_batch_size=192), "must be 1 for mlp, which does not say how to"),
    ],
    ids=str,
)
def test_a_run_begins_with_its_settings_and_what_the_data_and_the_model_ask_of_them(changes, message, config, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        train.train(changed(config, **changes), tmp_path)
    assert "\n" not in str(error.value)


def test_data_that_is_missing_or_corrupt_is_named(config, tmp_path, data_dir):
    with pytest.raises(
        data.DataMissing, match=f"cifar10 is not prepared in {tmp_path}\\.\n.*\n.*curl.*\n.*prepare cifar10"
    ):
        train.train(changed(config, dataset__name="cifar10", dataset__data_dir=str(tmp_path)), tmp_path / "run")
    whole = data.load("fashion_mnist", "test", data_dir=data_dir)
    version = next(pathlib.Path(data_dir, "fashion_mnist").glob("*.*.*"))
    cut = tmp_path / "fashion_mnist" / version.name
    cut.mkdir(parents=True)
    for path in version.iterdir():
        content = path.read_bytes()
        (cut / path.name).write_bytes(content[: len(content) // 2] if "test.array_record" in path.name else content)
    with pytest.raises(ValueError, match=rf"{cut} is corrupt \(.*\): delete it and prepare fashion_mnist again\.$"):
        train.train(changed(config, dataset__data_dir=str(tmp_path)), tmp_path / "run")
    assert len(whole) == 10_000


def test_a_workdir_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`workdir` must be a folder that can be written, got .*/file/run: Not a dir"):
        train.train(config, tmp_path / "file" / "run")


# ---- the command line ----

LOAD_MODULE = pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections reads configs by it


def command(*arguments):
    script = pathlib.Path(train.__file__)
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


@pytest.mark.usefixtures("compiled_alike")
def test_the_command_trains_and_ends_with_a_table(config, tmp_path):
    done = command(*arguments(config, tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "run")) == 2
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (told["steps"], told["model.options.hidden"], told["crossover.wire"]) == (2, [32], None)
    table = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line and "[" not in line)
    assert table["algorithm"].strip() == "crossover, 8 workers"
    assert "set up in" in done.stdout
    assert "set-up" in table["time"]
    assert "step/s" not in done.stderr  # a bar, which is for terminals
    assert "dataset_info.py" not in done.stderr


@LOAD_MODULE
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"OSError: \[Errno 2\] No such file or directory: '.*config\.py'"),
        ("def get_config(:", r"SyntaxError: invalid syntax \(config\.py, line 1\)"),
        ("import nonexistent", "ModuleNotFoundError: No module named 'nonexistent'"),
        ("x = 1", "unknown key in --config: module config_config has no attribute get_config"),
    ],
)
def test_a_config_that_cannot_be_loaded_is_one_line(source, message, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # what an earlier file left there is not cleared
    path = tmp_path / "config.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(SystemExit, match=message) as error:
        flags.parse_flags(["train.py", f"--config={path}", f"--workdir={tmp_path}"])
    assert "\n" not in error.value.code


@LOAD_MODULE
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("`x` must be y, got z."), "error: `x` must be y, got z."),
        (Diverged("loss of worker 1"), "error: loss of worker 1"),
        (data.DataMissing("not here"), "error: not here"),
        (KeyboardInterrupt(), 130),
        (TypeError("a bug"), None),
        (jax.errors.JaxRuntimeError("a bug"), None),
    ],
    ids=repr,
)
def test_a_mistake_is_a_sentence_and_a_bug_a_traceback(raised, expected, tmp_path, monkeypatch):
    flags.parse_flags(["train.py", f"--workdir={tmp_path}"])

    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(type(raised) if expected is None else SystemExit) as error:
        train.main([])
    assert expected is None or error.value.code == expected


# ---- parts ----


def test_warm_up_rises_evenly_and_the_last_step_still_learns(config):
    config.schedule.update(learning_rate=0.1, warmup=0.3)
    config.sgd.update(momentum=0.0, weight_decay=0.0)
    optimizer = make_optimizer(config, 10)
    params = {"b": jnp.zeros(1)}
    state, rates = optimizer.init(params), []
    for _ in range(10):
        updates, state = optimizer.update({"b": jnp.ones(1)}, state, params)
        rates.append(-updates["b"].item())
    cosine = [0.1 * (1 + math.cos(math.pi * t / 7)) / 2 for t in range(7)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, *cosine])


def test_the_papers_schedule_decays_by_its_power_and_stays_at_the_end(config):
    config.schedule.update(decay="polynomial", warmup=0.4)
    config.schedule.polynomial.update(tail=0.1, power=2.2, end=0.0025)
    schedule = make_schedule(config.schedule, 20, 1.0)
    rates = [float(schedule(step)) for step in range(20)]
    falls = [(1 - 0.0025) * (1 - t / 10) ** 2.2 + 0.0025 for t in range(10)]
    assert rates == pytest.approx([*((t + 1) / 9 for t in range(8)), *falls, 0.0025, 0.0025], rel=1e-4)


@pytest.mark.parametrize("steps", [10, 49, 60, 98])
def test_the_papers_schedule_is_finite_where_it_ends_compiled_too(config, steps):
    # Of optax' own the last rate was NaN for 60 steps: 1 − 60 · (1/60) is less than zero, and has no power.
    config.schedule.update(decay="polynomial", warmup=0.0)
    schedule = jax.jit(make_schedule(config.schedule, steps, 1.0))
    assert [float(schedule(t)) for t in (steps, steps + 1, 3 * steps)] == pytest.approx([0.0025] * 3)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_note_tells_of_which_worker_an_update_was_left_out_and_only_then(name, config):
    """Whatever the algorithm: with an all-reduce of all, else of the one whose gradient is not finite; and no later."""
    config = changed(config, algorithm=name, optimizer="adamw")  # some travel with its moments
    params = {"fc": {"kernel": jnp.ones((24, 40)), "bias": jnp.ones(24)}}
    algorithm = make_algorithm(config, make_optimizer(config, 10), params)
    step = cj.per_worker(lambda s, g, t: algorithm.update(g, s[1], s[0], t), N, replicated=(2,))
    state, seen = cj.copies((params, algorithm.init(params)), N), []
    for t in range(4):
        grads = cj.copies(params, N)
        if t in (1, 2):
            grads["fc"]["bias"] = grads["fc"]["bias"].at[3, 5].set(jnp.nan)
        state = step(state, grads, jnp.int32(t))
        is_note = lambda x: isinstance(x, NoteState)
        (note,) = (x for x in jax.tree.leaves(state[1], is_leaf=is_note) if is_note(x))
        seen.append(note.is_left_out.tolist())
    wrong = [name == "allreduce" or i == 3 for i in range(N)]
    assert seen == [[False] * N, wrong, wrong, [False] * N]


def test_lars_takes_the_papers_step(config):
    config.optimizer = "lars"
    config.schedule.update(learning_rate=2.0, warmup=0.0)
    config.lars.update(momentum=0.9, weight_decay=0.1, coefficient=0.01)
    optimizer = make_optimizer(config, 10)
    w, g = (np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32) for i in (0, 1))
    params, grads = {"kernel": w, "norm": w[0]}, {"kernel": g, "norm": g[0]}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    of_w, of_g = np.linalg.norm(w), np.linalg.norm(g)
    ratio = 0.01 * of_w / (of_g + 0.1 * of_w)
    np.testing.assert_allclose(updates["kernel"], -2.0 * ratio * (g + 0.1 * w), rtol=1e-5)
    np.testing.assert_allclose(updates["norm"], -2.0 * g[0], rtol=1e-5)


def test_smoothing_shares_a_label_evenly_by_the_other_classes():
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    labels = np.array([0, 3, 1, 2, 2])
    target = np.full((5, 4), 0.3 / 3)
    target[np.arange(5), labels] = 0.7
    expected = -(target * np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))).sum(1).mean()
    apply = lambda params, model_state, image, *, train, key: (image, model_state)
    batch = {"image": jnp.asarray(logits), "label": jnp.asarray(labels)}
    loss, _ = program.loss_fn(apply, {}, {}, batch, jax.random.key(0), label_smoothing=0.3)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_curves_are_drawn_of_rows_without_evaluation(tmp_path):
    rows = [{"step": 1, "epoch": 0.1, "train/loss": 2.0}]
    report.draw_curves(rows, tmp_path / "curves.png", "a run that was stopped early")
    check_picture(tmp_path / "curves.png")
