"""Where a run may write, and what is left of one that is killed."""

import pathlib
import signal
import subprocess
import sys

import pytest
from etils import epath

from experiments import export, figures, sweep, train
from experiments.data import builders
from tests.experiments.helpers import arguments, read_rows, scalars, small_config

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config(data_dir):
    return small_config(data_dir)


URLS = ["gs://bucket/run", "s3://bucket/run", "hdfs://host:9000/run", "file:///tmp/run"]


@pytest.mark.parametrize("url", [*URLS, pathlib.PurePath("gs://bucket/run"), epath.Path("gs://bucket/run")], ids=str)
def test_a_workdir_that_is_a_url_is_refused_at_once(url, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"^`workdir` must be a path of this machine, got \w+:/.*: .* mount the bucket"
    ):
        train.train(config, url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", URLS)
def test_no_command_writes_to_a_url(url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "load_study", lambda path: pytest.fail("begun"))
    with pytest.raises(SystemExit, match="error: `WORKDIR` must be a path of this machine"):
        export.main([url, "out"])
    with pytest.raises(SystemExit, match="error: `OUT` must be a path of this machine"):
        export.main(["run", url])
    for main, argument, argv in (
        (sweep.main, "--out", ["study.py", f"--out={url}"]),
        (figures.main, "--out", [f"--out={url}"]),
        (figures.main, "--results", [f"--results={url}", "--out=here"]),
    ):
        assert main(argv) == 1
        assert f"error: `{argument}` must be a path of this machine, got {url}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_data_are_not_prepared_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builders, "find", lambda name, data_dir: None)
    with pytest.raises(ValueError, match="`data_dir` must be a path of this machine, got gs://bucket/data"):
        builders.prepare("fashion_mnist", data_dir="gs://bucket/data")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from experiments import data, train
sys.argv[0] = "train.py"
batches = data.train_batches
def until_the_fourth(*args, **kwargs):
    for step, batch in enumerate(batches(*args, **kwargs), start=1):
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
data.train_batches = until_the_fourth
train.app.run(train.main, flags_parser=train.flags.parse_flags)
"""


@pytest.mark.tools  # as all that kills a process
@pytest.mark.usefixtures("compiled_alike")
def test_a_killed_run_leaves_every_row_to_tensorboard_too(config, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments(config, tmp_path), "--config.steps=6"], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    values = {(tag, row["step"]): value for row in rows for tag, value in row.items() if tag != "step"}
    assert scalars(tmp_path / "run") == pytest.approx(values, rel=1e-6)
