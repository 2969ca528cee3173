"""Runs that were interrupted, damaged, spoiled or moved to other workers, against the run that never was."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import crossover_jax as cj
from experiments import checkpoint, checksums, data, flags, processes, program, report, resume, settings, train
from experiments import workdir as workdir_module
from experiments.algorithms import ALGORITHMS
from experiments.configs import fashion_mnist
from experiments.resume import Resume
from experiments.step import Diverged

ROOT = pathlib.Path(__file__).parents[2]
N, STEPS = 8, 6


@pytest.fixture(scope="module")
def config(data_dir):
    """Steps 1 to 6 with checkpoints at 2, 4 and 6, of which two are kept, and rows at 3 and 6."""
    config = fashion_mnist.get_config()
    small = {"data_dir": os.fspath(data_dir), "eval_split": "test[:200]", "augment": True}
    config.dataset.update(small)
    config.model.name, config.model.options = "mlp", {"hidden": (32,)}
    config.batch_size, config.steps, config.log_every, config.eval_batch_size = 48, STEPS, 3, 200
    config.simulate, config.schedule.learning_rate, config.crossover.local_steps = "yes", 0.02, 3
    config.checkpoint.every = 2
    return config.lock()


def changed(config, **changes):
    """A config with `sgp__peers=` and so on."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config.lock()


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """`(workdir, state, rows)` of the whole run."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, *train.train(changed(config), workdir)


def stopped_at(step, workdir, target):
    """A copy of what is left of a run that was killed when `step` was the last checkpoint."""
    shutil.copytree(workdir, target)
    for later in checkpoint.steps(target):
        if later > step:
            shutil.rmtree(target / checkpoint.FOLDER / str(later))
    return target


def assert_same_bits(state, other):
    for (path, x), y in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def lasting(rows):
    return [{key: value for key, value in row.items() if key != "examples_per_second"} for row in rows]


def as_numpy(folder):
    """A tree of a checkpoint as orbax finds it."""
    with warnings.catch_warnings(action="ignore"), ocp.PyTreeCheckpointer() as orbax:  # sharding info is not provided
        return jax.tree.map(np.asarray, orbax.restore(folder))


def read_rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# ---- the same run ----


# By channels as users compile, of whose runs the bits are promised (`make test-all` compiles them all like that);
# and behind a condition.
MARKS = {"crossover": pytest.mark.full_compilation, "local_sgd": ()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in ALGORITHMS])
def test_a_run_resumed_is_the_run_that_was_never_stopped(name, config, tmp_path):
    if name != "crossover":
        config = changed(config, algorithm=name, crossover__local_steps=1)
    if name == "des_loc":
        config = changed(config, optimizer="adamw")
    config = changed(config, simulate="no", local_sgd__local_steps=3 if name == "local_sgd" else 1)
    devices = jax.devices()[:N]
    state, rows = train.train(config, tmp_path / "whole", devices=devices)
    assert checkpoint.steps(tmp_path / "whole") == [4, 6]
    workdir = stopped_at(4, tmp_path / "whole", tmp_path / "stopped")
    again, resumed_rows = train.train(config, workdir, devices=devices)
    status = json.loads((workdir / "status.json").read_text())
    assert (status["start"], status["step"], status["num_steps"]) == (4, 6, 6)
    assert_same_bits(state, again)
    assert [row["step"] for row in rows] == [3, 6]
    assert lasting(rows) == lasting(resumed_rows) == lasting(read_rows(workdir))


def test_a_run_that_has_ended_is_not_run_again(undisturbed, config, tmp_path, capsys):
    workdir, state, rows = undisturbed
    workdir = stopped_at(STEPS, workdir, tmp_path / "ended")
    again, again_rows = train.train(changed(config), workdir)
    assert_same_bits(state, again)
    assert again_rows == rows
    assert f"training 0 steps behind step {STEPS}" in capsys.readouterr().out


def test_metrics_behind_the_checkpoint_and_half_a_line_are_dropped(undisturbed, config, tmp_path):
    workdir, _, rows = undisturbed
    workdir = stopped_at(4, workdir, tmp_path / "stopped")
    assert [row["step"] for row in read_rows(workdir)] == [3, 6]
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "epo')
    train.train(changed(config), workdir)
    assert lasting(read_rows(workdir)) == lasting(rows)


def test_the_best_model_is_kept_beside_the_last(config, tmp_path, monkeypatch):
    accuracy = {2: 0.3, 3: 0.9, 4: 0.8, 6: 0.7}
    make = train.make_evaluate

    def make_evaluate(*args):
        evaluate = make(*args)
        return lambda step, *args: evaluate(step, *args) | {"eval/mean/accuracy": accuracy.get(step, 0.1)}

    monkeypatch.setattr(train, "make_evaluate", make_evaluate)
    config = changed(config, eval_every=1e-4, checkpoint__keep=1)  # every step
    train.train(config, tmp_path)
    assert checkpoint.steps(tmp_path) == [3, 6]
    assert checkpoint.read_record(tmp_path, 6)["best"] == [3, 0.9]
    stopped_at(3, tmp_path, tmp_path / "stopped")
    train.train(config, tmp_path / "stopped")
    assert checkpoint.steps(tmp_path / "stopped") == [3, 6]


def test_the_record_says_where_the_run_is_and_what_made_it(undisturbed):
    workdir, _, _ = undisturbed
    record = checkpoint.read_record(workdir, 4)
    assert (record["step"], record["examples"], record["num_workers"], record["rollbacks"]) == (4, 4 * 48, N, 0)
    assert record["config"]["algorithm"] == "crossover"
    assert record["provenance"]["jax"] == jax.__version__
    assert len(record["log"]["means"]["loss"]) == 1  # of step 4, for the row at 6


# ---- another config ----


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (dict(seed=1), Resume(), "in its checkpoint seed is 0, not 1: .* or pass --allow_config_change=seed"),
        (
            dict(seed=1, sgd__momentum=0.5),
            Resume(allow=["seed"]),
            r"sgd\.momentum is 0\.9, not 0\.5: .*=sgd\.momentum\.$",
        ),
        (dict(num_workers=4), Resume(), "num_workers is 8, not 4: .* or pass --resume_workers=overlap"),
        (dict(batch_size=96), Resume(allow=["batch_size"]), "`config.batch_size` must stay 48 .* got 96: name another"),
        (
            dict(num_workers=5),
            Resume("overlap"),
            "`batch_size` must be a multiple of `num_workers`, got 48 and 5; the nearest `batch_size` is 45 or 50",
        ),
        (dict(model__options={"hidden": (16,)}), Resume(allow=["model.options.hidden"]), r"params/.* is float32\[8, "),
        (dict(steps=3), Resume(allow=["steps"]), "`config.steps` must be at least the 6 that .*, got 3"),
    ],
)
def test_another_config_is_refused_by_its_keys(changes, options, message, undisturbed, config, tmp_path):
    workdir = stopped_at(STEPS, undisturbed[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and "logs" not in path.parts}
    with pytest.raises(ValueError, match=message):
        train.train(changed(config, **changes), workdir, resume=options)
    assert before == {path: path.read_bytes() for path in before}


def test_what_is_named_may_change_and_where_checkpoints_go_may_anyway(undisturbed, config, tmp_path):
    workdir = stopped_at(4, undisturbed[0], tmp_path / "run")
    config = changed(config, steps=8, checkpoint__every=3, checkpoint__keep=9)
    _, rows = train.train(config, workdir, resume=Resume(allow=["steps"]))
    assert rows[-1]["step"] == 8
    assert checkpoint.read_record(workdir, 8)["config"]["steps"] == 8


# ---- other workers ----


@pytest.mark.parametrize("how", ["overlap", "average"])
@pytest.mark.parametrize("workers", [4, 6, 1])
def test_other_workers_take_over(workers, how, undisturbed, config, tmp_path, made_of):
    workdir = stopped_at(4, undisturbed[0], tmp_path / "run")
    start = made_of(changed(config, num_workers=workers), workdir, Resume(how))
    old = as_numpy(workdir / "checkpoints/4/state")
    matrix = resume.MATRICES[how](N, workers)
    (before, *_), (after, *_) = jax.tree.leaves(old["params"]), jax.tree.leaves(start.state.params)
    np.testing.assert_allclose(after, np.tensordot(matrix, before, 1), rtol=1e-5, atol=1e-7)
    assert {len(x) for x in jax.tree.leaves(start.state)} == {workers}
    assert start.step == 4


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ((8, 1), (4, 2)),
        ((4, 2), (4, 1)),
        pytest.param((4, 2), (8, 1), marks=pytest.mark.slow),
        pytest.param((4, 1), (4, 2), marks=pytest.mark.slow),
    ],
)
def test_sharded_workers_go_on_unsharded_and_the_reverse(was, now, config, tmp_path, made_of, monkeypatch):
    monkeypatch.setattr(cj.specs, "fsdp_specs", fsdp_of_all := fsdp_for_small())
    monkeypatch.setattr(program.cj, "fsdp_specs", fsdp_of_all)

    def on(workers, fsdp):
        config_ = changed(config, num_workers=workers, inner__fsdp=fsdp, simulate="no", steps=2, eval_batch_size=48)
        return config_, jax.devices()[: workers * fsdp]

    before, devices = on(*was)
    state, _ = train.train(before, tmp_path, devices=devices)
    after, devices = on(*now)
    start = made_of(after, tmp_path, Resume("overlap", ["inner.fsdp"]), devices)
    expected = jax.device_get(state)
    if was[0] != now[0]:
        expected = cj.resize(expected, cj.overlap_matrix(was[0], now[0]))
    assert_same_bits(start.state, expected)
    sharded = [x for x in jax.tree.leaves(start.state.params) if "fsdp" in str(x.sharding.spec)]
    assert bool(sharded) == (now[1] > 1)


def fsdp_for_small():
    whole = cj.fsdp_specs
    return lambda params, mesh, **_: whole(params, mesh, min_size=64)


def test_a_run_on_other_workers_goes_on_to_its_end(undisturbed, config, tmp_path):
    workdir = stopped_at(4, undisturbed[0], tmp_path / "run")
    _, rows = train.train(changed(config, num_workers=4), workdir, resume=Resume("overlap"))
    assert [row["step"] for row in read_rows(workdir)] == [3, 6]
    assert checkpoint.read_record(workdir, 6)["num_workers"] == 4
    assert rows[-1]["train/loss"] == pytest.approx(undisturbed[2][-1]["train/loss"], rel=0.1)


@pytest.fixture(scope="module")
def made_of():
    """`first_or_restored` of a config and a workdir, without a step compiled."""

    def start(config, workdir, options=resume.SAME, devices=None, of=None):
        train_set = data.load(config.dataset.name, "train", data_dir=config.dataset.data_dir)
        where = program.place_workers(config, devices or jax.devices())
        made = {"data": checkpoint.read_record(workdir, min(checkpoint.steps(workdir)))["config"]["data"]}
        program_ = program.make_program(config, train_set, where, config.steps)
        return resume.first_or_restored(workdir, config, program_, train_set, where, made, options)

    return start


# ---- damage ----


@pytest.fixture(scope="module")
def restored(config, undisturbed):
    """`restored(workdir)` with the program made once, and the states of steps 4 and 6."""
    config = changed(config)
    train_set = data.load("fashion_mnist", "train", data_dir=config.dataset.data_dir)
    made_of_config = program.make_program(config, train_set, N, STEPS)
    made = {"data": checkpoint.read_record(undisturbed[0], 6)["config"]["data"]}

    def start(workdir):
        return resume.first_or_restored(workdir, config, made_of_config, train_set, N, made, resume.SAME)

    return start


@pytest.fixture(scope="module")
def states(undisturbed, restored, tmp_path_factory):
    early = stopped_at(4, undisturbed[0], tmp_path_factory.mktemp("early") / "run")
    return {4: jax.device_get(restored(early).state), 6: jax.device_get(undisturbed[1])}


def files(folder, pattern):
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def largest(folder):
    return max(files(folder, "*"), key=lambda path: path.stat().st_size)


def flip(path, place=0.5, bit=3):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def remove_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def change_a_value(folder):
    """What no file system would notice: another checkpoint, written as orbax writes it, of one other number."""
    state = as_numpy(folder / "state")
    leaf = state["params"]["fc"]["kernel"] = state["params"]["fc"]["kernel"].copy()
    leaf[3].flat[7] = np.nextafter(leaf[3].flat[7], 1)
    with ocp.PyTreeCheckpointer() as orbax:
        orbax.save(folder / "state", state, force=True)


def forge(folder, **changes):
    path = folder / "record/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "largest file truncated": lambda f: truncate(largest(f)),
    "largest file empty": lambda f: os.truncate(largest(f), 0),
    "largest file gone": lambda f: largest(f).unlink(),
    "largest file of zeros": lambda f: largest(f).write_bytes(bytes(largest(f).stat().st_size)),
    "byte flipped in the middle": lambda f: flip(largest(f)),
    "bit flipped near the end": lambda f: flip(largest(f), 0.9, 0),
    "manifest truncated": lambda f: truncate(f / "state/manifest.ocdbt"),
    "manifest flipped": lambda f: flip(f / "state/manifest.ocdbt"),
    "process missing": lambda f: shutil.rmtree(f / "state/ocdbt.process_0"),
    "metadata of the tree gone": lambda f: (f / "state/_METADATA").unlink(),
    "metadata of the tree truncated": lambda f: truncate(f / "state/_METADATA"),
    "state gone": lambda f: shutil.rmtree(f / "state"),
    "folder empty": remove_empty,
    "record gone": lambda f: shutil.rmtree(f / "record"),
    "record truncated": lambda f: truncate(f / "record/metadata"),
    "record flipped": lambda f: flip(f / "record/metadata"),
    "record of another step": lambda f: forge(f, step=5),
    "record of another place": lambda f: forge(f, examples=0),
    "record that is a list": lambda f: (f / "record/metadata").write_text("[]"),
    "one other number": change_a_value,
    "of another checkpoint": lambda f: shutil.copytree(f.parent / "4/state", f / "state", dirs_exist_ok=True),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_said_and_an_older_whole_one_is_taken(damage, undisturbed, restored, states, tmp_path, capsys):
    workdir = stopped_at(STEPS, undisturbed[0], tmp_path / "run")
    damage(workdir / "checkpoints/6")
    remains = {path.name: path.read_bytes() for path in files(workdir / "checkpoints/6", "*")}
    start = restored(workdir)
    assert start.step == 4
    assert_same_bits(start.state, states[4])
    assert (said := capsys.readouterr().out).startswith("WARNING: the checkpoint of step 6 is damaged: ")
    assert "going back to step 4" in said
    assert checkpoint.steps(workdir) == [4]
    assert {path.name: path.read_bytes() for path in files(workdir / "damaged/6", "*")} == remains  # nothing is deleted


def test_a_changed_number_is_named(undisturbed, restored, tmp_path, capsys):
    workdir = stopped_at(STEPS, undisturbed[0], tmp_path / "run")
    change_a_value(workdir / "checkpoints/6")
    restored(workdir)
    leaf = "params/fc/kernel is not as it was saved (1 of 11 leaves, of 1 of 8 workers)"
    assert leaf in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_never_gives_other_bits(seed, undisturbed, restored, states, tmp_path):
    rng = np.random.default_rng(seed)
    workdir = stopped_at(STEPS, undisturbed[0], tmp_path / "run")
    for _ in range(rng.integers(1, 4)):
        found = files(workdir / "checkpoints/6", "*")
        path = found[rng.integers(len(found))]
        content = path.read_bytes()
        cut, bit = rng.integers(len(content) + 1), rng.integers(8)
        changes = [
            lambda: path.unlink(),
            lambda: path.write_bytes(content[:cut]),
            lambda: path.write_bytes(content + rng.bytes(cut)),
            lambda: path.write_bytes(
                content[:cut] + bytes([x ^ 1 << bit for x in content[cut : cut + 1]]) + content[cut + 1 :]
            ),
            lambda: path.write_bytes(rng.bytes(len(content))),
        ]
        changes[rng.integers(len(changes))]()
    start = restored(workdir)
    assert start.step in (4, 6)
    assert_same_bits(start.state, states[start.step])


def test_where_all_are_damaged_nothing_is_deleted(undisturbed, restored, tmp_path):
    workdir = stopped_at(STEPS, undisturbed[0], tmp_path / "run")
    for step in (4, 6):
        truncate(largest(workdir / f"checkpoints/{step}"))
    before = {path: path.read_bytes() for path in files(workdir, "*")}
    with pytest.raises(
        ValueError, match=r"`workdir` must hold a whole checkpoint, .* all 2 are damaged; nothing was del"
    ):
        restored(workdir)
    assert before == {path: path.read_bytes() for path in files(workdir, "*")}


def test_a_save_that_was_interrupted_is_none(undisturbed, config, tmp_path):
    workdir = stopped_at(4, undisturbed[0], tmp_path / "run")
    shutil.copytree(undisturbed[0] / "checkpoints/6", workdir / "checkpoints/6.orbax-checkpoint-tmp")
    state, _ = train.train(changed(config), workdir)
    assert_same_bits(state, undisturbed[1])
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "6"]


def test_a_damaged_one_does_not_stand_in_the_way_of_the_next(undisturbed, config, tmp_path):
    workdir = stopped_at(STEPS, undisturbed[0], tmp_path / "run")
    for name in ("", ".1"):
        (workdir / "damaged").mkdir(exist_ok=True)
        truncate(largest(workdir / "checkpoints/6"))
        state, rows = train.train(changed(config), workdir)
        assert_same_bits(state, undisturbed[1])
        assert lasting(rows) == lasting(undisturbed[2])
        assert (workdir / f"damaged/6{name}").is_dir()


# ---- checksums ----


def checksums_in_numpy(leaf):
    """The same in numpy: every word mixed with its place, summed."""
    words = leaf.reshape(leaf.shape[0], -1).astype(leaf.dtype)
    kind = {1: np.uint8, 2: np.uint16}.get(leaf.dtype.itemsize, np.uint32)
    words = (words.astype(np.uint8) if leaf.dtype == bool else words.view(kind)).astype(np.uint64)
    place = np.arange(words.size, dtype=np.uint64).reshape(words.shape)
    found, low = [], np.uint64(2**32 - 1)
    for seed in (1, 0x7F4A7C15):
        h = words ^ ((place * np.uint64(0x9E3779B1) + np.uint64(seed)) & low)
        h = ((h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & low
        h = ((h ^ (h >> np.uint64(16))) * np.uint64(0xC2B2AE35)) & low
        h = h ^ (h >> np.uint64(15))
        found.append(h.sum(1) & low)
    return np.stack(found, -1).astype(np.uint32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"])
def test_checksums_are_numpys_however_the_leaf_lies(dtype):
    leaf = jax.random.normal(jax.random.key(0), (8, 6, 4)).astype(dtype)
    expected = checksums_in_numpy(np.asarray(leaf))
    mesh = cj.make_mesh(4, {"fsdp": 2}, devices=jax.devices()[:8])
    for spec in (None, jax.P("worker"), jax.P("worker", "fsdp"), jax.P(None, "fsdp", "worker")):
        placed = leaf if spec is None else jax.device_put(leaf, jax.NamedSharding(mesh, spec))
        of_leaves, of_workers, finite = checksums.inspect({"x": placed})
        np.testing.assert_array_equal(of_workers, expected)
        np.testing.assert_array_equal(of_leaves[0], expected.sum(0, dtype=np.uint32))
        assert np.asarray(finite).all()


def test_no_flipped_bit_and_no_exchange_goes_unseen():
    leaf = np.asarray(jax.random.normal(jax.random.key(0), (2, 5)))
    sums = np.asarray(jax.jit(checksums._checksums)(leaf))
    for i in range(2 * 5 * 32):
        other = leaf.copy()
        other.view(np.uint32).flat[i // 32] ^= np.uint32(1 << i % 32)
        differ = (np.asarray(jax.jit(checksums._checksums)(other)) != sums).any(-1)
        assert differ.tolist() == [i < 5 * 32, i >= 5 * 32]
    assert (np.asarray(checksums._checksums(leaf[::-1])) != sums).any()
    assert (np.asarray(checksums._checksums(leaf[:, ::-1])) != sums).any()


# ---- signals, and two runs at once ----


def at_step(monkeypatch, step, act):
    """Do something when the batch of a step is read."""
    read = train.train_batches

    def batches(config, dataset, part, first=0, rollbacks=0):
        for i, batch in enumerate(read(config, dataset, part, first, rollbacks), start=first + 1):
            yield (act(batch, rollbacks) if i == step else None) or batch

    monkeypatch.setattr(train, "train_batches", batches)


def test_sigterm_ends_at_a_step_that_is_saved_and_the_run_goes_on(undisturbed, config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(train.Preempted, match=r"ended at step 3 of 6 by SIGTERM: the same command goes on from"):
            train.train(changed(config), tmp_path)
        assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint.steps(tmp_path) == [2, 3]
    state, rows = train.train(changed(config), tmp_path)
    assert_same_bits(state, undisturbed[1])
    assert lasting(rows) == lasting(undisturbed[2])


def test_sigterm_without_checkpoints_says_that_nothing_is_left(config, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(train.Preempted, match=r"without checkpoints .* nothing of it is left"):
        train.train(changed(config, checkpoint__every=None), tmp_path)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_a_preempted_run_has_the_exit_code_that_says_start_again(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise train.Preempted("ended at step 3")

    flags.parse_flags(["train.py", f"--workdir={tmp_path}"])
    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(SystemExit) as error:
        train.main([])
    assert error.value.code == processes.PREEMPTED == os.EX_TEMPFAIL
    assert capsys.readouterr().out == "ended at step 3\n"


def test_a_second_signal_ends_at_once():
    code = """
import os, signal
from experiments import processes
with processes.Preemption() as preemption:
    assert not preemption.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.reached(2)
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -signal.SIGTERM


def test_one_run_at_a_time(undisturbed, config):
    workdir = undisturbed[0]
    with (
        workdir_module.locked(workdir),
        pytest.raises(ValueError, match=r"`workdir` must be of one run at a time, got .* where another runs"),
    ):
        train.train(changed(config), workdir)


def test_metrics_without_a_checkpoint_are_not_written_over(config, tmp_path):
    train.train(changed(config, steps=1, log_every=1), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"`workdir` must not hold the metrics\.jsonl of a run without checkpoints"):
        train.train(changed(config, steps=1, log_every=1), tmp_path)


# ---- numbers that are none ----


def unknown_class(batch, *_):
    label = np.asarray(batch["label"]).copy()
    label[5, 0] = 1_000_000  # its loss is NaN
    return batch | {"label": label}


def test_a_loss_that_is_nan_leaves_the_last_good_checkpoint_and_names_where(config, tmp_path, monkeypatch):
    at_step(monkeypatch, 4, unknown_class)
    with pytest.raises(Diverged) as error:
        train.train(changed(config), tmp_path)
    assert str(error.value).startswith("loss of worker 5 is nan at step 4 (1 of 8 workers): lower")
    assert checkpoint.steps(tmp_path) == [0, 2]


def test_a_gradient_names_its_parameter_and_segments(config, tmp_path, monkeypatch):
    loss_fn = program.loss_fn

    def spoiled(apply, params, model_state, batch, key, **smoothing):
        loss, aux = loss_fn(apply, params, model_state, batch, key, **smoothing)
        bad = (jax.lax.axis_index("worker") == 3) * jnp.inf
        kernel = params["layers"][0]["kernel"]
        return loss + jnp.where(jnp.isnan(bad), 0, bad) * (kernel - jax.lax.stop_gradient(kernel)).sum() * 0, aux

    monkeypatch.setattr(program, "loss_fn", spoiled)
    with pytest.raises(Diverged, match=r"worker 3 .* in 1 of 4 parameters, first in layers/0/kernel: lower"):
        train.train(changed(config, simulate="no"), tmp_path, devices=jax.devices()[:N])


def test_a_state_that_is_not_finite_is_never_saved(config, tmp_path):
    with pytest.raises(Diverged, match=r"^update of worker 0 is nan at step 1 \(8 of 8 workers\): lower"):
        train.train(
            changed(config, schedule__learning_rate=3e38, sgd__weight_decay=3e38, checkpoint__every=1), tmp_path
        )
    assert checkpoint.steps(tmp_path) == [0]


@pytest.mark.parametrize("large", [False, True])  # handed to a thread, or not
def test_a_save_names_what_is_not_finite(large, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SMALL", 0 if large else checkpoint.SMALL)
    state = {"a": jnp.zeros((4, 3)), "b": jnp.zeros((4, 2)).at[2, 1].set(jnp.inf)}
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, 2)) as saves:

        def save(step, state):
            saves.save(step, state, {})
            saves.wait()

        save(1, {"a": state["a"], "b": state["a"]})
        with pytest.raises(Diverged, match=r"^b of worker 2 is not finite after step 2 \(1 of 4 workers\): lower"):
            save(2, state)
        save(3, {"a": state["a"], "b": state["a"]})
    assert checkpoint.steps(tmp_path) == [1, 3]


def test_rollback_goes_on_with_other_data(config, undisturbed, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 5, lambda batch, rollbacks: None if rollbacks else unknown_class(batch))
    config = changed(config, on_nan="rollback")
    state, rows = train.train(config, tmp_path)
    assert "rollback 1 to step 4, the data in another order" in capsys.readouterr().out
    assert [row["step"] for row in rows] == [row["step"] for row in read_rows(tmp_path)] == [3, 6]
    assert rows[0]["train/loss"] == undisturbed[2][0]["train/loss"]
    assert rows[1]["train/loss"] != undisturbed[2][1]["train/loss"]
    assert checkpoint.read_record(tmp_path, 6)["rollbacks"] == 1
    workdir = stopped_at(4, tmp_path, tmp_path / "killed")  # before its next checkpoint: it goes the same way
    again, _ = train.train(config, workdir)
    assert_same_bits(state, again)


def test_rollbacks_have_an_end(config, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 3, unknown_class)
    with pytest.raises(Diverged, match="loss of worker 5 is nan at step 3"):
        train.train(changed(config, on_nan="rollback", max_rollbacks=2), tmp_path)
    assert capsys.readouterr().out.count("rollback ") == 2
    assert checkpoint.steps(tmp_path) == [0, 2]


# ---- the disk ----

FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.argv[0] = "experiments/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.tools  # in a process of its own; failing saves in this one are below
@pytest.mark.usefixtures("compiled_alike")
def test_what_cannot_be_written_is_said_and_the_run_goes_on(config, undisturbed, tmp_path):
    """Files may not grow beyond 60 kB, as on a disk that is full; the checkpoints of step 4 and before are there."""
    workdir = stopped_at(4, undisturbed[0], tmp_path / "run")
    flags = [
        f"--config.{key}={value}"
        for key, value in settings.flat_settings(changed(config)).items()
        if "options" not in key
    ]
    flags += ["--config.model.options={'hidden': (32,)}", "--config.schedule.learning_rate=0.02"]
    command = [sys.executable, "-c", FULL, f"--workdir={workdir}", *flags]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "WARNING: the checkpoint of step 6 could not be saved, the run goes on; the last whole one is" in done.stdout
    assert "Traceback" not in done.stderr
    assert checkpoint.steps(workdir) == [4]
    assert lasting(read_rows(workdir)) == lasting(undisturbed[2])


def fill_the_disk(monkeypatch, from_step=0):
    """Saves of `from_step` and later fail in orbax' thread, as those on a full disk do."""
    write = ocp.PyTreeCheckpointHandler.async_save

    async def refuse(self, directory, *args, **kwargs):
        if int(directory.parent.name.split(".")[0]) >= from_step:
            raise OSError(28, "No space left on device")
        return await write(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", refuse)


def test_a_run_whose_first_checkpoint_cannot_be_written_does_not_go_on(config, tmp_path, monkeypatch):
    fill_the_disk(monkeypatch)
    with pytest.raises(checkpoint.NotSaved, match=r"^the first checkpoint, of step 0, could not be saved, so the run "):
        train.train(changed(config), tmp_path)
    assert checkpoint.steps(tmp_path) == []
    assert read_rows(tmp_path) == []  # the same command may be given again
    monkeypatch.undo()
    _, rows = train.train(changed(config), tmp_path)
    assert rows[-1]["step"] == STEPS


def test_what_orbax_stumbles_over_behind_a_failed_save_does_not_hide_why_it_failed(config, tmp_path, monkeypatch):
    """Its thread of metadata may find that the unfinished folder has been cleared away."""
    fill_the_disk(monkeypatch)

    def stumble(self):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(ocp.CheckpointManager, "close", stumble)
    with pytest.raises(checkpoint.NotSaved, match=r"^the first checkpoint, of step 0, could not be saved"):
        train.train(changed(config), tmp_path)


def test_a_folder_of_checkpoints_that_cannot_be_made_is_one_sentence(config, tmp_path):
    (tmp_path / checkpoint.FOLDER).touch()
    with pytest.raises(checkpoint.NotSaved, match=r"/checkpoints must be a folder that can be written: ") as error:
        train.train(changed(config), tmp_path)
    assert "\n" not in str(error.value)
    assert read_rows(tmp_path) == []


def test_rows_that_could_not_be_written_at_the_end_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    log = report.Log(tmp_path, title="", num_steps=2, batch_size=1, steps_per_epoch=1, wire_bytes_per_step=0)
    monkeypatch.setattr(report, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    log.add({"loss": np.ones((1, 2)), "accuracy": np.ones((1, 2))})
    log.row(1)
    with pytest.raises(
        report.Unwritten, match=r"^the last 1 rows of metrics\.jsonl could not be written: No space left"
    ):
        log.end()
    monkeypatch.undo()
    log.end()
    assert [row["step"] for row in read_rows(tmp_path)] == [1]
    log.close()


def test_rows_that_a_full_disk_refused_are_written_with_the_next(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").touch()
    log = report.Log(tmp_path, title="", num_steps=2, batch_size=1, steps_per_epoch=1, wire_bytes_per_step=0)
    metrics = {"loss": np.ones((1, 2)), "accuracy": np.ones((1, 2))}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        log.add(metrics)
        log.row(1)
    assert read_rows(tmp_path) == []
    assert "WARNING: metrics.jsonl could not be written, the run goes on: No space left" in capsys.readouterr().out
    log.add(metrics)
    log.row(2)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    log.close()
