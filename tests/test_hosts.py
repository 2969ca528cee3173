"""Hosts with limited links on this machine: what a link lets through, and that nothing stays behind."""

import csv
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.tools
ROOT = pathlib.Path(__file__).parents[1]
HOSTS, SCALING = ("-m", "benchmarks.network.hosts"), ("-m", "benchmarks.network.scaling")
# host0 hears 1.25 MB from each of two others at once, and then sends them as much.
TALK = """
import socket, threading, time
SIZE, me = 1_250_000, socket.gethostname()

def receive(end):
    left = SIZE
    while left:
        left -= len(end.recv(min(left, 1 << 16)))

def in_threads(function, ends):
    began, threads = time.perf_counter(), [threading.Thread(target=function, args=(end,)) for end in ends]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return time.perf_counter() - began

def ask(end):
    end.sendall(b"?")
    receive(end)

def send(end):
    end.sendall(bytes(SIZE))
    end.recv(1)

if me == "host0":
    with socket.create_server(("host0", 9000)) as server:
        ends = [server.accept()[0] for _ in range(2)]
    print(in_threads(ask, ends), in_threads(send, ends))
else:
    while True:
        try:
            end = socket.create_connection(("host0", 9000))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    end.recv(1)
    end.sendall(bytes(SIZE))
    receive(end)
    end.sendall(b"!")
"""


def run(program, *args, timeout=120):
    command = [sys.executable, *map(str, (*program, *args))]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


@pytest.fixture(scope="module", autouse=True)
def _allowed():
    done = run(HOSTS, "--hosts", 1, "--", "true")
    if "error: hosts need" in done.stderr:  # no root, or a kernel or tools that cannot: the line says what is missing
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def test_every_host_has_its_own_name_address_and_link():
    done = run(HOSTS, "--hosts", 3, "--rate", "10mbit", "--", "sh", "-c", "hostname; hostname -i; ip -br link | wc -l")
    said = [
        line.removeprefix(f"host {i}: ") for i in range(3) for line in done.stdout.splitlines() if f"host {i}:" in line
    ]
    assert said == [x for i in range(3) for x in (f"host{i}", f"10.99.0.{i + 1}", "2")], done.stderr


def test_a_link_carries_its_rate_in_each_direction_and_no_more():
    """Two others could send, and take, twice as much as host0's own link lets through."""
    done = run(HOSTS, "--hosts", 3, "--rate", "20mbit", "--", sys.executable, "-c", TALK)
    inwards, outwards = map(float, done.stdout.split()[2:])
    assert 0.9 < inwards < 1.6, done.stderr
    assert 0.9 < outwards < 1.6


def test_what_cannot_be_is_refused_in_a_line():
    for args, message in (
        (["--hosts", 2, "--rate", "fast"], "error: `rate` must be one that tc reads, as 200mbit, got 'fast'"),
        (["--hosts", 251], "error: `commands` must be for at most 250 hosts, got 251."),
    ):
        done = run(HOSTS, *args, "--", "true")
        assert done.returncode == 1
        assert done.stderr.startswith(message)


def test_a_command_that_fails_is_named_with_its_error_and_ends_the_others():
    began = time.monotonic()
    done = run(HOSTS, "--hosts", 2, "--", "sh", "-c", "[ $(hostname) = host1 ] && sleep 60; echo broken >&2; exit 3")
    assert (done.returncode, done.stderr.strip()) == (1, "error: host 0 ended with 3: broken")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_behind_when_it_is_killed(how):
    mark = f"86{400 + how}"  # seconds that nobody else sleeps
    command = [sys.executable, *HOSTS, "--hosts", "2", "--", "sleep", mark]
    left = set(pathlib.Path("/mnt").iterdir())
    with subprocess.Popen(command, cwd=ROOT) as laboratory:
        wait_until(lambda: len(running(f"sleep\0{mark}\0")) == 2)
        laboratory.send_signal(how)
    wait_until(lambda: not running(f"sleep\0{mark}\0"))
    assert set(pathlib.Path("/mnt").iterdir()) == left


def running(command):
    return [path for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if content(path) == command]


def content(path):
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""


def wait_until(holds):
    for _ in range(200):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("waited for 20 s")


@pytest.mark.slow
def test_steps_on_hosts_take_what_their_links_allow(tmp_path):
    algorithms = "alone,allreduce,sgp,crossover/2,switch/2,crossover/2/int8,crossover/2/home"
    out = tmp_path / "x.csv"
    args = ["--hosts", 3, "--rate", "20mbit", "--params", 3e5, "--compute", 2, "--steps", 3]
    done = run(SCALING, *args, "--algorithms", algorithms, "--out", out, timeout=300)
    assert done.returncode == 0, done.stderr
    with open(out, newline="") as file:
        rows = {
            row["algorithm"]: {k: v if k in ("algorithm", "rate") else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        }
    assert list(rows) == algorithms.split(",")
    transfer = 8 * 1.2e6 / 20e6
    assert {row["compute_s"] for row in rows.values()} == {round(2 * transfer, 4)}
    for name, models in {"allreduce": 4 / 3, "sgp": 1, "crossover/2": 1, "switch/2": 1}.items():
        assert rows[name]["payload_bytes"] == pytest.approx(models * 1.2e6, rel=5e-3)  # leaves are padded
        assert 0.99 * models * 1.2e6 < rows[name]["frame_bytes"] < 1.2 * models * 1.2e6
        assert rows[name]["limit_s"] == pytest.approx((2 + models) * transfer, rel=0.01)
        assert 0.95 < rows[name]["ratio_to_limit"] < 2
    assert rows["crossover/2/int8"]["payload_bytes"] == pytest.approx(65 / 256 * 1.2e6, rel=1e-2)
    assert rows["crossover/2/int8"]["step_s"] < rows["crossover/2"]["step_s"] - 0.4 * transfer
    assert rows["crossover/2/home"]["payload_bytes"] == 0
    assert rows["crossover/2/home"]["frame_bytes"] < 0.05 * 1.2e6
    assert rows["alone"]["step_s"] == pytest.approx(2 * transfer, rel=0.1)


@pytest.mark.parametrize("program", [SCALING, ["benchmarks/scaling.py"]], ids=["module", "script"])
def test_an_option_that_an_algorithm_does_not_have_is_refused(program):
    for text in ("sgp/during", "allreduce/int8", "crossover/int4", "gossip"):
        done = run(program, "--algorithms", text)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert text.split("/")[-1] in done.stderr
