"""Rows of a run for Weights & Biases: the same as in metrics.jsonl, whatever happens to the service."""

import os
import subprocess
import sys

import pytest

from experiments import train
from experiments.report import TAGS
from tests.experiments.helpers import STEPS, arguments, read_rows, small_config


class Service:
    """What `wandb` is to a run: a module with `init`, and a run with `log` and `finish`."""

    def __init__(self, error=None):
        self.error, self.rows, self.names, self.is_finished = error, [], [], False

    def init(self, **names):
        self.names.append(names)
        return self

    def log(self, row, step):
        if self.error is not None:
            raise self.error
        self.rows.append({"step": step} | row)

    def finish(self):
        self.is_finished = True


def run(data_dir, workdir, service, monkeypatch, **changes):
    monkeypatch.setitem(sys.modules, "wandb", service)
    config = small_config(data_dir).copy_and_resolve_references()
    config.update(changes)
    train.train(config, workdir, wandb="gossip")
    return read_rows(workdir)


def test_the_service_has_the_rows_of_the_file_and_one_run_for_a_workdir(data_dir, tmp_path, monkeypatch):
    service = Service()
    rows = run(data_dir, tmp_path / "a", service, monkeypatch, steps=2, checkpoint={"every": 1})
    assert service.rows == [{TAGS.get(name, name): value for name, value in row.items()} for row in rows]
    assert service.is_finished
    run(data_dir, tmp_path / "a", service, monkeypatch, steps=2, checkpoint={"every": 1})  # has ended: no new row
    assert len(service.rows) == len(rows) == 2
    one, again = service.names
    assert (one["project"], one["name"], one["id"]) == ("gossip", "a", again["id"])
    assert one["config"]["num_workers"] == 8


def test_a_service_that_is_away_is_said_once_and_the_run_goes_on(data_dir, tmp_path, monkeypatch, caplog):
    rows = run(data_dir, tmp_path / "a", Service(ConnectionError("no route")), monkeypatch)
    assert len(rows) == STEPS
    assert caplog.text.count("did not take a row, the run goes on: ConnectionError: no route") == 1


def test_without_the_library_nothing_is_begun(data_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^`--wandb` needs its library: `pip install wandb`, or leave it out; .*\.$"):
        run(data_dir, tmp_path / "a", None, monkeypatch)
    assert not (tmp_path / "a").exists()


@pytest.mark.tools
def test_the_real_library_takes_a_run_without_a_network(data_dir, tmp_path):
    pytest.importorskip("wandb", reason="optional: `pip install wandb`")
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        *arguments(small_config(data_dir), tmp_path),
        "--wandb=gossip",
    ]
    done = subprocess.run(command, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
