"""Natural language out of a package, and what a run on text reports."""

import gzip
import math
import os
import pathlib
import shutil
import struct
import subprocess
import zlib

import jax
import numpy as np
import pytest

import crossover_jax as cj
from experiments import checkpoint, data, models, report, train
from experiments.algorithms import make_algorithm
from experiments.configs import lm, lm_1m
from experiments.data import corpora, prepare, sources
from experiments.optimizers import make_optimizer, make_schedule
from experiments.program import make_program, wire_bytes_per_step
from experiments.settings import check_settings
from tests.experiments.helpers import changed, read_rows, scalars

ROOT = pathlib.Path(__file__).parents[2]
ENTRIES = b"Lark \\Lark\\, v. i.\n   To sport; to frolic.\n   [1913 Webster]\n\n" * 40


def dictzip(content, chunk=256):
    """A file of dictd as RFC 1952 and dictzip(1) lay it out: chunks that can be read alone, their sizes in the head."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts = [content[i : i + chunk] for i in range(0, len(content), chunk)]
    packed = [packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH) for part in parts]
    sizes = struct.pack(f"<3H{len(packed)}H", 1, chunk, len(packed), *map(len, packed))
    field = b"RA" + struct.pack("<H", len(sizes)) + sizes
    head = b"\x1f\x8b\x08\x04" + bytes(6) + struct.pack("<H", len(field)) + field
    return head + b"".join(packed) + packer.flush() + struct.pack("<II", zlib.crc32(content), len(content))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of an installed dict-gcide."""
    folder = tmp_path / "dictd"
    folder.mkdir()
    (folder / "gcide.dict.dz").write_bytes(dictzip(ENTRIES))
    monkeypatch.setitem(sources.DEBIAN, "gcide", ("dict-gcide", folder))
    monkeypatch.setattr(sources, "_call", lambda *_: pytest.fail("a command was run"))
    return folder


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_dictionary_becomes_text_that_the_data_set_reads(by_hand, package, tmp_path, capsys):
    arguments = ["gcide", "--data_dir", str(tmp_path / "data")]
    if by_hand:
        moved = package.rename(tmp_path / "x")
        arguments += ["--manual_dir", str(moved)]
    assert prepare.main(arguments) == 0
    assert f"{tmp_path / 'data' / 'gcide.txt'}: {len(ENTRIES)} bytes." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["gcide.txt"]
    for data_dir in (tmp_path / "data" / "gcide.txt", tmp_path / "data"):
        dataset = data.load("text", "train", data_dir=data_dir, sequence=64)
        assert dataset.source.image.tobytes() == ENTRIES[: len(dataset) * 64]


def test_a_corpus_that_is_there_is_not_unpacked_again(package, tmp_path):
    (tmp_path / "gcide.txt").write_bytes(b"mine")
    assert corpora.prepare_text("gcide", data_dir=tmp_path).read_bytes() == b"mine"


@pytest.mark.parametrize(
    "spoil", [lambda x: x[:-100], lambda x: x[: len(x) // 2] + x[len(x) // 2 + 1 :], lambda x: b"no gzip"]
)
def test_a_package_that_is_not_whole_leaves_no_text(spoil, package, tmp_path, capsys):
    path = package / "gcide.dict.dz"
    path.write_bytes(spoil(path.read_bytes()))
    assert prepare.main(["gcide", "--data_dir", str(tmp_path / "data")]) == 1
    assert f"{path} must be a whole gzip file, got " in capsys.readouterr().err
    assert list((tmp_path / "data").iterdir()) == []


def test_a_corpus_that_is_not_to_be_had_is_explained_with_the_commands_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sources.DEBIAN, "gcide", ("dict-gcide", tmp_path / "no"))
    monkeypatch.setattr(sources.shutil, "which", lambda _: None)
    assert prepare.main(["gcide", "--data_dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'no'} does not exist.\n  apt-get is not on this machine." in said
    assert "apt-get download dict-gcide && dpkg-deb -x dict-gcide_*.deb x" in said
    assert f"python -m experiments.data.prepare gcide --data_dir {tmp_path} --manual_dir x/usr/share/dictd" in said


def test_what_only_data_sets_have_is_refused_for_a_corpus(package, tmp_path, capsys):
    assert prepare.main(["gcide", "--data_dir", str(tmp_path), "--num_shards", "2"]) == 1
    assert capsys.readouterr().err == "`--num_shards` must be left out for gcide, which is text, got 2.\n"
    with pytest.raises(ValueError, match="`name` must be one of gcide, got 'kjv'"):
        corpora.prepare_text("kjv", data_dir=tmp_path)


def test_dictzip_of_these_tests_is_gzip():
    assert gzip.decompress(dictzip(ENTRIES)) == ENTRIES


# ---- clipping and the schedule ----

GRADIENTS = {"a": np.array([[3.0, 0.0], [0.1, -0.3]], np.float32), "b": np.array([[4.0], [0.2]], np.float32)}


def first_update(algorithm, clip_norm):
    """Of two workers that are given `GRADIENTS`, by SGD of rate 1 and nothing else."""
    config = changed(lm.get_config(), optimizer="sgd", algorithm=algorithm, num_workers=2, clip_norm=clip_norm)
    config.update_from_flattened_dict({"sgd.momentum": 0.0, "sgd.weight_decay": 0.0})
    config.update_from_flattened_dict({"schedule.warmup": 0.0, "schedule.learning_rate": 1.0})
    params = jax.tree.map(lambda g: np.zeros_like(g[0]), GRADIENTS)
    chosen = make_algorithm(config, make_optimizer(config, 10), params)
    step = cj.per_worker(lambda g, s, x: chosen.update(g, s, x, 0)[0], 2, donate=False)
    return step(GRADIENTS, *cj.copies((chosen.init(params), params), 2))


@pytest.mark.parametrize("algorithm", ["alone", "allreduce"])
def test_what_is_clipped_is_a_worker_s_own_gradient_or_the_averaged_one(algorithm):
    flat = np.concatenate([GRADIENTS["a"], GRADIENTS["b"]], 1)  # norms 5 and 0.374
    if algorithm == "allreduce":
        flat = np.broadcast_to(flat.mean(0), flat.shape)
    norms = np.sqrt((flat**2).sum(1, keepdims=True))
    for clip_norm, expected in ((None, -flat), (2.0, -flat * np.minimum(1, 2 / norms))):
        update = first_update(algorithm, clip_norm)
        np.testing.assert_allclose(np.concatenate([update["a"], update["b"]], 1), expected, rtol=1e-6, atol=1e-7)


def test_the_cosine_ends_where_the_config_says():
    schedule = make_schedule(lm.get_config().schedule, 800, peak=0.016)
    found = [float(schedule(step)) for step in range(0, 801, 20)]
    for step, rate in zip(range(0, 801, 20), found, strict=True):
        down = (1 + math.cos(math.pi * (step - 80) / 720)) / 2
        up = (1 + step) / 81
        assert rate == pytest.approx(0.016 * (up if step < 80 else 0.1 + 0.9 * down), rel=1e-5)
    assert found[-1] == pytest.approx(0.0016)


# ---- the configs ----


@pytest.mark.parametrize(("config", "size"), [(lm, 151_872), (lm_1m, 1_016_960)])
def test_a_config_has_its_parameters_and_sends_three_rounds_of_bytes(config, size):
    config = config.get_config()
    check_settings(config)
    program = make_program(config, data.describe("text", sequence=64), 8, config.steps)
    assert sum(x.size for x in jax.tree.leaves(program.shapes.params)) == size
    numbers = math.ceil(size / 7)  # of each of a round's seven messages: a byte each, and 4 for every 256 of them
    message = numbers + 4 * math.ceil(numbers / 256)
    sent = wire_bytes_per_step(program.algorithm, program.shapes.params, config)
    assert sent == pytest.approx(3 * 7 * message, rel=1e-3)
    assert sent < 4 * size  # less than the model in float32


# ---- what a run on text reports ----

SEQUENCE, BATCH, STEPS, WORKERS = 16, 8, 4, 2
OPTIONS = {"num_layers": 1, "width": 8, "num_heads": 2, "mlp_width": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Config, folder, last state and rows of a run that is evaluated behind its second and its last step."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    config = changed(lm.get_config(), num_workers=WORKERS, batch_size=BATCH, steps=STEPS, simulate="yes", log_every=1)
    config.update_from_flattened_dict({"dataset.data_dir": os.fspath(folder / "fox.txt"), "dataset.sequence": SEQUENCE})
    config.update_from_flattened_dict({"checkpoint.every": None, "eval_batch_size": 4, "algorithm": "allreduce"})
    config.update_from_flattened_dict({"crossover.rounds": 1, "crossover.wire": None})
    config.dataset.eval_split = "validation"
    config.model.options.update(OPTIONS)
    config.eval_every = 2 * BATCH / (1440 // SEQUENCE)  # 1800 bytes, of which eight tenths are trained on
    return config, folder, *train.train(config.lock(), folder)


def test_bits_per_byte_are_the_averaged_model_s_log2_of_what_it_gave_the_bytes(run):
    config, folder, state, rows = run
    held_out = data.load("text", "validation", data_dir=config.dataset.data_dir, sequence=SEQUENCE).source
    params = jax.tree.map(lambda x: np.asarray(x, np.float64).mean(0).astype(np.float32), state.params)
    graphdef, *_ = models.build("decoder", num_classes=256, image_shape=(SEQUENCE,), seed=0, **config.model.options)
    logits, _ = models.apply(graphdef, params, {}, held_out.image, train=False, key=None)
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = -np.log2(np.take_along_axis(p, held_out.label[..., None], -1)).mean()
    assert rows[-1]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [2, 4]
    assert read_rows(folder) == rows
    assert scalars(folder)["bits_per_byte", STEPS] == pytest.approx(expected, rel=1e-5)


def test_the_best_model_of_text_is_that_of_fewest_bits_per_byte_whatever_its_accuracy(run, tmp_path, monkeypatch):
    losses, make = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.2}, train.make_evaluate

    def make_evaluate(*args):
        evaluate = make(*args)
        better_at_guessing = lambda step: {"eval/mean/accuracy": step / 10, "eval/mean/loss": losses[step]}
        return lambda step, *args: evaluate(step, *args) | better_at_guessing(step)

    monkeypatch.setattr(train, "make_evaluate", make_evaluate)
    config = changed(run[0], eval_every=1e-4, checkpoint__every=STEPS, checkpoint__keep=1)
    train.train(config, tmp_path)
    assert checkpoint.steps(tmp_path) == [2, 4]
    step, best = checkpoint.read_record(tmp_path, 4)["best"]
    assert (step, best) == (2, pytest.approx(-2.0 / math.log(2)))


def test_bytes_and_tokens_are_counted_per_worker_and_over_all_workers(run):
    *_, state, rows = run
    size = sum(x.size for x in jax.tree.leaves(state.params)) / WORKERS
    each = BATCH // WORKERS * SEQUENCE  # tokens of a worker's step
    for row in rows:
        assert row["wire_bytes_per_token"] == pytest.approx(4 * size * 2 * (WORKERS - 1) / WORKERS / each)
        assert row["tokens_per_second"] == pytest.approx(row["examples_per_second"] * SEQUENCE)


def test_the_table_of_a_run_on_text_has_its_bits_bytes_and_speed(run):
    config, _, _, rows = run
    log = report.Log(None, title="", num_steps=STEPS, batch_size=BATCH, steps_per_epoch=1, wire_bytes_per_step=0)
    log.rows = rows
    table, last = train.results(config, log, 1.0), rows[-1]
    assert table["bits per byte, averaged model"] == f"{last['bits_per_byte']:.4f}"
    assert table["sent per worker and token"] == f"{last['wire_bytes_per_token']:.1f} bytes"
    assert table["tokens per second"] == f"{last['tokens_per_second']:.0f}"
    log.rows = [{name: value for name, value in last.items() if "byte" not in name} | {"wire_bytes_per_step": 0}]
    assert not any("byte" in name or "token" in name for name in train.results(config, log, 1.0))


@pytest.mark.parametrize("sends", [True, False])
def test_the_curves_of_text_are_bits_and_distances_and_their_title_names_the_bytes(sends, run):
    *_, rows = run
    if not sends:
        rows = [row | {"wire_bytes_per_step": 0.0, "wire_bytes_per_token": 0.0} for row in rows]
    figure = report.text_curves(rows, "a run")
    bits, distance = figure.axes
    training, held_out = bits.lines
    np.testing.assert_allclose(training.get_ydata(), [row["train/loss"] / math.log(2) for row in rows])
    np.testing.assert_array_equal(held_out.get_xydata(), [[row["step"], row["bits_per_byte"]] for row in rows[1::2]])
    np.testing.assert_array_equal(distance.lines[0].get_ydata(), [row["consensus_distance"] for row in rows[1::2]])
    assert figure.get_suptitle() == f"a run: {rows[-1]['wire_bytes_per_token']:.1f} bytes sent per token"
    assert [axis.get_xlabel() for axis in bits.child_axes] == ["MB sent by each worker"] * sends


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(("target", "config"), [("lm", "lm"), ("train", "fashion_mnist")])
def test_make_trains_the_config_in_a_folder_of_its_name(target, config):
    said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"experiments/train.py --config=experiments/configs/{config}.py --workdir=runs/{config}-2" in said
