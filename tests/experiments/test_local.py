"""The launcher of many processes on one machine, with a stand-in for train.py: what is started again, and with what."""

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

# Processes that a launcher starts and signals: run by `make test-tools`.
pytestmark = pytest.mark.tools

ROOT = pathlib.Path(__file__).parents[2]
# Writes down how it was called and, when all have, does what the plan says for its process and its how-manieth start:
# end with a code, die of a signal, wait for SIGTERM and end with 75 (if nothing is said), or ignore it.
STAND_IN = """
import json, os, pathlib, signal, sys, time

flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
own, folder = flags["process_id"], pathlib.Path(flags["workdir"])
start = len(list(folder.glob(f"*-{own}")))
plan = json.loads(flags["plan"])
todo = plan[min(start, len(plan) - 1)].get(own, "wait")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
called = {"args": sys.argv[1:], "flags": flags, "pid": os.getpid(), "devices": os.environ["JAX_NUM_CPU_DEVICES"]}
(folder / f".{own}").write_text(json.dumps(called))
(folder / f".{own}").rename(folder / f"{start}-{own}")
while len(list(folder.glob(f"{start}-*"))) < int(flags["num_processes"]):
    time.sleep(0.01)
"""
STAND_IN += stand_in.AS_TOLD
WIDE = local.Shape(4, 8, devices=2, batch_size=256, eval_batch_size=1024)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the stand-in writes; it takes the place of train.py in this process."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(local, "TRAIN", script)
    monkeypatch.setattr(local, "POLL", 0.02)
    (tmp_path / "calls").mkdir()
    return tmp_path / "calls"


def arguments(folder, plan, *options, flags=(), processes=2):
    train_flags = [f"--workdir={folder}", f"--plan={json.dumps(plan)}", *flags]
    return [f"--processes={processes}", "--grace=0.3", *options, "--", *train_flags]


def starts(folder):
    """What the processes of each start were called with, `[start][process]`."""
    paths = sorted(folder.glob("*-*"))  # of less than ten
    return [[json.loads(p.read_text()) for p in group] for _, group in itertools.groupby(paths, lambda p: p.name[0])]


def assert_none_is_left(folder):
    for call in itertools.chain(*starts(folder)):
        assert not is_alive(call["pid"])


def test_all_processes_that_end_well_are_one_start(folder, capsys):
    assert local.main(arguments(folder, [{"0": 0, "1": 0}], "--restarts=3", "--devices-per-process=5")) == 0
    ((first, second),) = starts(folder)
    assert (first["devices"], first["flags"]["num_processes"]) == ("5", "2")
    assert first["flags"]["coordinator"] == second["flags"]["coordinator"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("SIGKILL", "process 1 was killed by SIGKILL"),
        ("SIGSEGV", "process 1 was killed by SIGSEGV"),
        ("SIGABRT", "process 1 was killed by SIGABRT"),
        (75, "the job was preempted"),
    ],
)
def test_all_start_again_on_another_port_after_a_death_or_a_preemption(failure, said, folder, capsys, monkeypatch):
    ports = iter([7001, 7002])
    monkeypatch.setattr(local, "free_port", lambda: next(ports))
    flags = ["--config.num_workers=8", "--resume_workers=average"]
    plan = [{"1": failure}, {"0": 0, "1": 0}]
    assert local.main(arguments(folder, plan, "--restarts=2", flags=flags)) == 0
    before, after = starts(folder)
    assert [call["flags"]["coordinator"] for call in before + after] == ["localhost:7001"] * 2 + ["localhost:7002"] * 2
    for was, now in zip(before, after, strict=True):
        assert [x for x in was["args"] if "coordinator" not in x] == [x for x in now["args"] if "coordinator" not in x]
    assert capsys.readouterr().err == f"local.py: {said}; restart 1 of 2\n"
    assert_none_is_left(folder)


@pytest.mark.parametrize("code", [1, 2, 130])
def test_an_error_that_would_come_again_is_not_restarted(code, folder, capsys):
    assert local.main(arguments(folder, [{"1": code}], "--restarts=3")) == code
    assert len(starts(folder)) == 1
    assert capsys.readouterr().err == ""
    assert_none_is_left(folder)


@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize(("failure", "code"), [("SIGKILL", 137), (75, 75)])
def test_restarts_are_limited(restarts, failure, code, folder, capsys):
    plan = [{"0": failure}] * (restarts + 1) + [{"0": 0, "1": 0}]
    assert local.main(arguments(folder, plan, f"--restarts={restarts}")) == code
    assert len(starts(folder)) == restarts + 1
    assert capsys.readouterr().err.count("; restart ") == restarts


class Scripted:
    """A process that ends with a code at the n-th look."""

    def __init__(self, look, code):
        self.look, self.code, self.looks, self.signals = look, code, 0, []

    def poll(self):
        self.looks += 1
        assert self.looks < 10_000
        return self.code if self.looks >= self.look else None

    def send_signal(self, number):
        self.signals.append(number)

    def kill(self):
        if self.poll() is None:
            self.look, self.code = 0, -signal.SIGKILL


@pytest.mark.parametrize(
    ("processes", "blamed"),
    [
        ([(1, 0), (2, 0)], {}),
        ([(3, 1), (2, -9), (5, 0)], {1: -9}),  # the first
        ([(2, -9), (2, -9), (3, 1)], {0: -9, 1: -9}),
        ([(2, 1), (2, -9), (2, -6)], {1: -9}),  # its peers fail within the same look: seen with train.py
        ([(2, 1), (2, -6)], {0: 1}),
        ([(2, 75), (2, 1), (2, 75)], {0: 75, 2: 75}),
        ([(2, -6), (3, -9)], {0: -6}),
        ([(2, 0), (3, 75)], {1: 75}),
        ([(9**9, 0), (2, -15)], {1: -15}),  # one that hangs is killed, after the grace
    ],
)
def test_who_failed_first_is_to_blame_and_of_those_at_once_whom_the_others_missed(processes, blamed, monkeypatch):
    monkeypatch.setattr(local, "POLL", 0.001)
    assert local.to_blame(local.wait_for([Scripted(*p) for p in processes], grace=0.05)) == blamed


@pytest.mark.parametrize(
    ("shape", "dead", "processes", "workers"),
    [
        (WIDE, 0, 4, 8),
        (WIDE, 1, 2, 4),  # 6 workers do not divide 256
        (WIDE, 2, 2, 4),
        (WIDE, 3, 1, 2),
        (WIDE._replace(batch_size=240, eval_batch_size=960), 1, 3, 6),
        (WIDE._replace(workers=2), 1, 2, 1),  # a worker of two processes
        (WIDE._replace(workers=2), 3, None, None),  # half a worker
        (WIDE._replace(workers=4, batch_size=24, eval_batch_size=24, devices=1), 1, 3, 3),
        (WIDE._replace(workers=4, batch_size=24, eval_batch_size=24, devices=1, micro_batches=3), 1, 2, 2),
        (WIDE._replace(workers=4, batch_size=36, eval_batch_size=36, devices=8), 1, None, None),  # 24, 16, 8 devices
        (WIDE._replace(workers=4, batch_size=36, eval_batch_size=36, devices=8, tensor=8), 1, 3, 3),
        (WIDE._replace(workers=4, batch_size=24, devices=1), 1, 2, 2),  # 3 do not divide the 1024 of an evaluation
        (WIDE, 4, None, None),
    ],
)
def test_a_job_shrinks_to_the_most_processes_whose_workers_share_the_batch(shape, dead, processes, workers):
    smaller = local.shrunk(shape, dead)
    assert (smaller and smaller[:2]) == (processes and (processes, workers))


def test_a_shrunk_job_has_fewer_processes_and_workers_each_time(folder, capsys, monkeypatch):
    monkeypatch.setattr(local, "read_shape", lambda args: WIDE)
    flags = ["--config.num_workers=8", "--config.seed=1", "--resume_workers=average"]
    plan = [{"3": "SIGKILL"}, {"1": 75}, {"1": "SIGKILL"}, {"0": "SIGKILL"}]
    options = ["--restarts=5", "--shrink"]
    assert local.main(arguments(folder, plan, *options, flags=flags, processes=4)) == 137
    found = [[call["flags"] for call in start] for start in starts(folder)]
    assert [len(start) for start in found] == [4, 2, 2, 1]
    assert [start[0]["num_processes"] for start in found] == ["4", "2", "2", "1"]
    assert [start[0]["config.num_workers"] for start in found] == ["8", "4", "4", "2"]
    assert [start[0]["resume_workers"] for start in found] == ["average"] + ["overlap"] * 3
    for call in itertools.chain(*starts(folder)):
        names = [arg.split("=")[0] for arg in call["args"]]
        assert sorted(names) == sorted(set(names))
        assert call["flags"]["config.seed"] == "1"
    assert capsys.readouterr().err.splitlines() == [
        "local.py: process 3 was killed by SIGKILL; restart 1 of 5 with 2 of 4 processes and 4 of 8 workers "
        "(3 processes would be 6 workers, which do not divide the batch of 256)",
        "local.py: the job was preempted; restart 2 of 5",
        "local.py: process 1 was killed by SIGKILL; restart 3 of 5 with 1 of 2 processes and 2 of 4 workers",
        "local.py: process 0 was killed by SIGKILL; nothing is left that could train",
    ]


def test_who_aborts_has_lost_nothing_to_shrink_by(folder, monkeypatch):
    monkeypatch.setattr(local, "read_shape", lambda args: WIDE)
    plan = [{"2": "SIGABRT"}, dict.fromkeys("0123", 0)]
    assert local.main(arguments(folder, plan, "--restarts=1", "--shrink", processes=4)) == 0
    assert [len(start) for start in starts(folder)] == [4, 4]


@pytest.mark.parametrize(
    "before",
    [
        [],
        ["--config.num_workers=8"],
        ["--config.num_workers", "8", "--resume_workers", "average"],
        ["-config.num_workers=8", "--config.num_workers=4", "--resume_workers=overlap"],
    ],
)
def test_flags_are_replaced_however_they_are_written(before):
    flags = ["--workdir=x", *before, "--config.num_workers_else=1"]
    found = local.replaced(flags, {"config.num_workers": "2", "resume_workers": "overlap"})
    kept = ["--workdir=x", "--config.num_workers_else=1"]
    assert found == [*kept, "--config.num_workers=2", "--resume_workers=overlap"]


def test_the_numbers_come_from_the_config_as_train_reads_it():
    code = "import sys; from experiments.launch import local; print(tuple(local.read_shape(local.parse(sys.argv[1:]))))"
    options = ["--processes=3", "--devices-per-process=2", "--restarts=1", "--shrink", "--"]
    flags = [
        "--config.num_workers=6",
        "--config.batch_size=96",
        "--config.eval_batch_size=60",
        "--config.inner.tensor=2",
    ]
    done = subprocess.run([sys.executable, "-c", code, *options, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{(3, 6, 2, 96, 60, 1, 2)}\n", done.stderr


def test_a_config_that_cannot_be_loaded_is_one_line():
    options = ["--restarts=1", "--shrink", "--", "--config.num_worker=6"]
    done = subprocess.run([sys.executable, local.__file__, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown key in --config")
    assert done.stderr.count("\n") == 1


def test_to_shrink_is_to_restart(capsys):
    with pytest.raises(SystemExit, match="2"):
        local.main(["--shrink"])
    assert "--shrink needs --restarts" in capsys.readouterr().err


# Signals to the launcher itself, which then is a process of its own


@pytest.fixture
def launch(folder):
    """Start the launcher, and wait until so many processes wait for signals."""
    code = (
        "import pathlib, signal, sys; from experiments.launch import local\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores\n"
        f"local.TRAIN, local.POLL = pathlib.Path({str(local.TRAIN)!r}), 0.02\n"
        "sys.exit(local.main(sys.argv[1:]))"
    )
    launched = []

    def start(plan, *options, waiting=2):
        line = [sys.executable, "-c", code, *arguments(folder, plan, *options)]
        launched.append(subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        wait_until(lambda: len(list(folder.glob("*-*"))) == waiting)
        return launched[0]

    yield start
    for call in itertools.chain(*starts(folder)):
        if is_alive(call["pid"]):
            os.kill(call["pid"], signal.SIGKILL)  # or it would hold the pipe open
    for process in launched:
        process.kill()
        process.communicate()


def test_sigterm_goes_on_to_all_processes_and_nothing_is_restarted(launch, folder):
    launcher = launch([{}], "--restarts=3")
    launcher.terminate()
    _, said = launcher.communicate(timeout=60)
    assert (launcher.returncode, said) == (75, "")
    assert len(starts(folder)) == 1
    assert_none_is_left(folder)


def test_after_sigterm_the_others_have_their_grace(launch, folder):
    launcher = launch([{"1": "ignore"}], "--restarts=3", "--grace=1")
    launcher.terminate()
    began = time.monotonic()
    _, said = launcher.communicate(timeout=60)
    assert time.monotonic() - began > 0.9
    assert (launcher.returncode, said) == (75, "")
    assert len(starts(folder)) == 1
    assert_none_is_left(folder)


def test_a_second_sigterm_kills(launch, folder):
    launcher = launch([{"0": "ignore", "1": "ignore"}], "--restarts=3")
    launcher.terminate()
    time.sleep(0.3)
    assert launcher.poll() is None
    launcher.terminate()
    _, said = launcher.communicate(timeout=60)
    assert (launcher.returncode, said) == (137, "")
    assert len(starts(folder)) == 1
    assert_none_is_left(folder)


def test_signals_go_on_one_by_one_though_they_come_together():
    process = Scripted(9**9, 0)
    assert local.wait_for([process], 1, [signal.SIGTERM, signal.SIGTERM]) == {0: -signal.SIGKILL}
    assert process.signals == [signal.SIGTERM, signal.SIGTERM]


def test_sigint_kills_all(launch, folder):
    launcher = launch([{"0": "ignore", "1": "ignore"}], "--restarts=3")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == 130
    assert_none_is_left(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_processes_end_with_a_launcher_that_is_killed(launch, folder):
    launcher = launch([{"0": "ignore", "1": "ignore"}])
    pids = [call["pid"] for call in starts(folder)[0]]
    assert all(map(is_alive, pids))
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_processes_that_were_started_end_when_another_cannot_be(folder, monkeypatch):
    started, popen = [], subprocess.Popen

    def third_fails(*args, **kwargs):
        if len(started) == 2:
            raise OSError("no more processes")
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", third_fails)
    with pytest.raises(OSError, match="no more processes"):
        local.main(arguments(folder, [{}], processes=3))
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
