"""Hosts with limited links on this machine: what a link lets through, and that nothing stays behind."""

import csv
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HOSTS, SCALING = ROOT / "benchmarks/hosts.py", ROOT / "benchmarks/scaling.py"
SEND = """
import socket, sys, time, pathlib
me = socket.gethostname()
if me == "host0":
    with socket.create_server(("host0", 9000)) as server:
        end, _ = server.accept()
        while end.recv(1 << 16):
            pass
else:
    while True:
        try:
            end = socket.create_connection(("host0", 9000))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    began = time.perf_counter()
    end.sendall(bytes(2_500_000))
    end.shutdown(socket.SHUT_WR)
    end.recv(1)
    print(time.perf_counter() - began)
"""


def run(*args, timeout=120):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module", autouse=True)
def _allowed():
    done = run(HOSTS, "--hosts", 1, "--", "true")
    if "error: hosts need" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def test_every_host_has_its_own_name_address_and_link():
    done = run(HOSTS, "--hosts", 3, "--rate", "10mbit", "--", "sh", "-c", "hostname; hostname -i; ip -br link | wc -l")
    said = [
        line.removeprefix(f"host {i}: ") for i in range(3) for line in done.stdout.splitlines() if f"host {i}:" in line
    ]
    assert said == [x for i in range(3) for x in (f"host{i}", f"10.99.0.{i + 1}", "2")], done.stderr


def test_a_link_carries_its_rate_and_no_more():
    done = run(HOSTS, "--hosts", 2, "--rate", "20mbit", "--", sys.executable, "-c", SEND)
    seconds = float(done.stdout.rpartition(" ")[2])
    assert 0.9 < seconds < 1.6, done.stderr  # 20 Mbit, and 2 Mbit that a link lets through at once


def test_a_command_that_fails_is_named_with_its_error_and_ends_the_others():
    began = time.monotonic()
    done = run(HOSTS, "--hosts", 2, "--", "sh", "-c", "[ $(hostname) = host1 ] && sleep 60; echo broken >&2; exit 3")
    assert (done.returncode, done.stderr.strip()) == (1, "error: host 0 ended with 3: broken")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_behind_when_it_is_killed(how):
    mark = f"86{400 + how}"  # seconds that nobody else sleeps
    command = [sys.executable, str(HOSTS), "--hosts", "2", "--", "sleep", mark]
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout
    with subprocess.Popen(command) as laboratory:
        wait_until(lambda: len(running(f"sleep\0{mark}\0")) == 2)
        laboratory.send_signal(how)
    wait_until(lambda: not running(f"sleep\0{mark}\0"))
    assert subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout == links


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
    algorithms = "alone,allreduce,sgp,crossover/2,crossover/2/int8,crossover/2/during"
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
    for name, models in {"allreduce": 4 / 3, "sgp": 1, "crossover/2": 1, "crossover/2/during": 1}.items():
        assert rows[name]["payload_bytes"] == pytest.approx(models * 1.2e6, rel=5e-3)  # leaves are padded
        assert 0.99 * models * 1.2e6 < rows[name]["frame_bytes"] < 1.2 * models * 1.2e6
        assert rows[name]["limit_s"] == pytest.approx((2 if "during" in name else 2 + models) * transfer, rel=0.01)
        assert 0.95 < rows[name]["ratio_to_limit"] < 2
    assert rows["crossover/2/int8"]["payload_bytes"] == pytest.approx(65 / 256 * 1.2e6, rel=1e-2)
    assert rows["crossover/2/during"]["step_s"] < rows["crossover/2"]["step_s"]
