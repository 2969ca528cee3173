"""What is said while a run goes on: a bar on a terminal, a line a minute elsewhere; and the profile of some steps."""

import io
import logging
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import profiling, progress, train
from experiments.configs import lm
from experiments.processes.log import LOG
from tests.experiments.helpers import changed

ROOT = pathlib.Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def lines(monkeypatch):
    """What the process's own log gets."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setattr(LOG, "handlers", [handler])
    return found


def run_for_three_minutes(monkeypatch, stderr):
    """300 of 1000 steps were done before; then 200 more, two a second."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stderr)
    shown = progress.Progress(300, 1000, shown=True)
    for i in range(200):
        now[0] += 0.5 if i < 120 else 2.0
        shown.tick(1)
        if i == 60:
            shown.show({"loss": "0.345"})
    shown.close()


TOLD = [
    "step 420 of 1000, 42 %, 2 steps/s, 04:50 left, loss 0.345",
    "step 450 of 1000, 45 %, 0.5 steps/s, 18:20 left, loss 0.345",
    "step 480 of 1000, 48 %, 0.5 steps/s, 17:20 left, loss 0.345",
]


def test_where_there_is_no_terminal_a_line_is_printed_each_minute_and_no_bar(monkeypatch, capsys, lines):
    stderr = io.StringIO()
    run_for_three_minutes(monkeypatch, stderr)
    assert stderr.getvalue() == ""
    assert capsys.readouterr().out.splitlines() == TOLD
    assert lines == TOLD


def test_a_terminal_has_a_bar_with_the_time_that_is_left_and_the_log_file_the_lines(monkeypatch, capsys, lines):
    stderr = Terminal()
    run_for_three_minutes(monkeypatch, stderr)
    assert "| 300/1000 [" in stderr.getvalue()
    assert "<" in stderr.getvalue()  # before it what has passed, behind it what is left
    assert capsys.readouterr().out == ""
    assert lines == TOLD


def test_other_processes_tell_nothing(monkeypatch, capsys, lines):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    shown = progress.Progress(0, 10, shown=False)
    shown.tick(1)
    shown.close()
    assert capsys.readouterr() == ("", "")
    assert lines == []


def in_a_process_of_its_own(function, folder):
    """What it prints. Where another test has loaded libtpu, the profiler ends the process (jaxlib 0.10.2)."""
    code = f"from tests.experiments.test_progress import {function.__name__} as run; run({str(folder)!r})"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def profiled_run(folder):
    folder = pathlib.Path(folder)
    config = changed(lm.get_config(), algorithm="allreduce", crossover__rounds=1, crossover__wire=None)
    config = changed(config, num_workers=2, batch_size=8, steps=18, simulate="yes", checkpoint__every=None)
    config = changed(config, eval_every=10.0, eval_batch_size=4, dataset__eval_split="validation")
    config = changed(config, dataset__data_dir=str(folder / "fox.txt"), dataset__sequence=16)
    config.model.options.update({"num_layers": 1, "width": 8, "num_heads": 2, "mlp_width": 8})
    train.train(config.lock(), folder, profile=True)
    (path,) = (folder / "profile").rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))  # must live as long as what is read from it
    events = [event for plane in profile.planes for line in plane.lines for event in line.events]
    print(sorted(v for event in events if event.name == "train" for name, v in event.stats if name == "step_num"))


def test_a_profile_has_steps_10_to_15(tmp_path):
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 80)
    printed = in_a_process_of_its_own(profiled_run, tmp_path)
    assert printed.splitlines()[-1] == str([*range(10, 16)])
    assert f"profile of steps from 10 on in {tmp_path / 'profile'}" in printed


def profiled_loop(folder):
    recording = profiling.Profile(pathlib.Path(folder), 100, is_wanted=True)
    for step in (109, 110, 111):
        with recording.named(step):
            result = jax.numpy.zeros(3) + step
        recording.end(step, result)
        assert not (pathlib.Path(folder) / "profile").exists()
    recording.close()
    recording.close()


def test_a_run_that_ends_before_leaves_what_there_is(tmp_path):
    assert in_a_process_of_its_own(profiled_loop, tmp_path).count("profile of steps from 110 on") == 1
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
