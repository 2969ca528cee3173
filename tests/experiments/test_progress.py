"""What is said while a run goes on: a bar on a terminal, a line a minute elsewhere; and the profile of some steps."""

import io
import logging
import sys

import jax
import pytest

from experiments import profiling, progress, train
from experiments.configs import lm
from experiments.processes.log import LOG
from tests.experiments.helpers import changed


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


@pytest.mark.filterwarnings("ignore:builtin type event_stats")  # of jaxlib 0.12, which aborts if it is an error
def test_a_profile_has_steps_10_to_15(tmp_path, capsys):
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 80)
    config = changed(lm.get_config(), algorithm="allreduce", crossover__rounds=1, crossover__wire=None)
    config = changed(config, num_workers=2, batch_size=8, steps=18, simulate="yes", checkpoint__every=None)
    config = changed(config, eval_every=10.0, eval_batch_size=4, dataset__eval_split="validation")
    config = changed(config, dataset__data_dir=str(tmp_path / "fox.txt"), dataset__sequence=16)
    config.model.options.update({"num_layers": 1, "width": 8, "num_heads": 2, "mlp_width": 8})
    train.train(config.lock(), tmp_path, profile=True)
    (path,) = (tmp_path / "profile").rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))  # must live as long as what is read from it
    events = [event for plane in profile.planes for line in plane.lines for event in line.events]
    steps = [value for event in events if event.name == "train" for name, value in event.stats if name == "step_num"]
    assert sorted(steps) == [*range(10, 16)]
    assert f"profile of steps from 10 on in {tmp_path / 'profile'}" in capsys.readouterr().out


def test_a_run_that_ends_before_leaves_what_there_is(tmp_path, capsys):
    recording = profiling.Profile(tmp_path, 100, is_wanted=True)
    for step in (109, 110, 111):
        with recording.named(step):
            result = jax.numpy.zeros(3) + step
        recording.end(step, result)
        assert (tmp_path / "profile").exists() is False
    recording.close()
    recording.close()
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert capsys.readouterr().out.count("profile of steps from 110 on") == 1
