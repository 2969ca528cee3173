"""The launcher of islands on one machine, with a stand-in for island.py: each is started again alone."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.launch import local
from tests.experiments import stand_in
from tests.experiments.stand_in import is_alive, wait_until

pytestmark = pytest.mark.tools

ROOT = pathlib.Path(__file__).parents[2]
# Writes down how it was called, and does what the plan says for its name and its how-manieth start: end with a code,
# die of a signal, wait for SIGTERM and end with 75 (if nothing is said), or ignore it.
STAND_IN = """
import json, os, pathlib, signal, sys, time

flags = dict(arg[2:].partition("=")[::2] for arg in sys.argv[1:])
name, folder = flags["name"], pathlib.Path(flags["workdir"])
folder.mkdir(parents=True, exist_ok=True)
start = len(list(folder.glob("start-*")))
todo = (json.loads(flags["plan"]).get(name, []) + ["wait"] * 9)[start]
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
called = {"flags": flags, "pid": os.getpid(), "devices": os.environ["JAX_NUM_CPU_DEVICES"]}
(folder / ".start").write_text(json.dumps(called))
(folder / ".start").rename(folder / f"start-{start}")
"""
STAND_IN += stand_in.AS_TOLD


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Below which the islands have their folders; the stand-in takes the place of island.py in this process."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(local, "ISLAND", script)
    monkeypatch.setattr(local, "POLL", 0.02)
    return tmp_path / "run"


def arguments(folder, plan, *options, islands=3, flags=()):
    return [f"--islands={islands}", *options, "--", f"--workdir={folder}", f"--plan={json.dumps(plan)}", *flags]


def starts(folder):
    """What each island was started with, by name."""
    names = sorted(path.name for path in folder.iterdir())
    return {name: [json.loads(p.read_text()) for p in sorted((folder / name).glob("start-*"))] for name in names}


def test_each_island_has_a_name_and_a_folder_and_all_have_one_roster(folder, capsys):
    plan = {"a": [0], "b": [0], "c": [0]}
    assert local.main(arguments(folder, plan, flags=["--config.seed", "1"])) == 0
    found = starts(folder)
    assert list(found) == ["a", "b", "c"]
    for name, [call] in found.items():
        flags = call["flags"]
        assert (flags["name"], flags["workdir"]) == (name, f"{folder}/{name}")
        assert (flags["roster"], flags["config.num_workers"]) == (f"{folder}/roster", "3")
        assert flags["plain_text"] == ""
        assert call["devices"] == "1"
    assert capsys.readouterr().err == ""


def test_what_is_said_of_roster_keys_and_number_stays(folder):
    said = ["--roster=elsewhere", "--keys=some/keys", "--config.num_workers=8"]
    assert local.main(arguments(folder, {"a": [0]}, "--devices-per-process=2", islands=1, flags=said)) == 0
    [call] = starts(folder)["a"]
    assert {f"--{name}={call['flags'][name]}" for name in ("roster", "keys", "config.num_workers")} == set(said)
    assert "plain_text" not in call["flags"]
    assert call["devices"] == "2"


def test_an_island_that_was_killed_is_started_again_alone(folder, capsys):
    plan = {"a": ["SIGKILL", "SIGSEGV", 0], "b": [0], "c": [75, 0]}
    assert local.main(arguments(folder, plan, "--restarts=2")) == 0
    assert {name: len(calls) for name, calls in starts(folder).items()} == {"a": 3, "b": 1, "c": 2}
    for first, *others in starts(folder).values():
        assert all(other["flags"] == first["flags"] for other in others)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "local.py: island a was killed by SIGKILL; restart 1 of 2",
        "local.py: island a was killed by SIGSEGV; restart 2 of 2",
        "local.py: island c was preempted; restart 1 of 2",
    ]


@pytest.mark.parametrize(("failure", "code"), [("SIGKILL", 137), (75, 75), (1, 1)])
def test_who_stays_away_does_not_end_the_others(failure, code, folder, capsys):
    plan = {"a": [failure, failure, failure], "b": ["SIGKILL", 0]}
    assert local.main(arguments(folder, plan, "--restarts=1", islands=2)) == code
    assert len(starts(folder)["a"]) == (1 if failure == 1 else 2)  # an error would come again
    assert len(starts(folder)["b"]) == 2
    assert "island a" in capsys.readouterr().err


def test_islands_need_a_workdir_and_do_not_shrink(capsys):
    for wrong, said in (
        (["--islands=2"], "needs a --workdir"),
        (["--islands=2", "--shrink", "--restarts=1"], "shrink"),
    ):
        with pytest.raises(SystemExit, match="2"):
            local.main(wrong)
        assert said in capsys.readouterr().err


# Signals to the launcher itself, which then is a process of its own


@pytest.fixture
def launch(folder):
    """Start the launcher, and wait until all its islands have been started."""
    code = (
        "import pathlib, signal, sys; from experiments.launch import local\n"
        f"local.ISLAND, local.POLL = pathlib.Path({str(local.ISLAND)!r}), 0.02\n"
        "sys.exit(local.main(sys.argv[1:]))"
    )
    launched = []

    def start(plan, *options, islands=3):
        line = [sys.executable, "-c", code, *arguments(folder, plan, *options, islands=islands)]
        launched.append(subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        wait_until(lambda: len(list(folder.glob("*/start-*"))) == islands)
        return launched[0]

    yield start
    for call in itertools.chain(*starts(folder).values()):
        if is_alive(call["pid"]):
            os.kill(call["pid"], signal.SIGKILL)  # or it would hold the pipe open
    for process in launched:
        process.kill()
        process.communicate()


def pids(folder):
    return [call["pid"] for calls in starts(folder).values() for call in calls]


def test_sigterm_goes_on_to_all_islands_and_none_is_started_again(launch, folder):
    launcher = launch({}, "--restarts=3")
    launcher.terminate()
    _, said = launcher.communicate(timeout=60)
    assert (launcher.returncode, said) == (75, "")
    assert len(pids(folder)) == 3
    assert not any(map(is_alive, pids(folder)))


@pytest.mark.parametrize("terms", [1, 2])
def test_who_does_not_end_after_sigterm_is_killed_after_the_grace_or_a_second_one(terms, launch, folder):
    launcher = launch({"b": ["ignore"]}, "--restarts=3", f"--grace={1 if terms == 1 else 600}")
    for _ in range(terms):
        launcher.terminate()
        time.sleep(0.3)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode in (75, 137)
    assert said == ""
    assert not any(map(is_alive, pids(folder)))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_islands_end_with_a_launcher_that_is_killed(launch, folder):
    launcher = launch({name: ["ignore"] for name in "abc"})
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(map(is_alive, pids(folder))))
