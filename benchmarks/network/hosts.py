"""Hosts with real, limited links on one Linux machine: network namespaces on a bridge, `tbf` at both ends of each link.

    sudo python -m benchmarks.network.hosts --hosts 4 --rate 50mbit -- sh -c 'hostname; ping -c 1 10.99.0.1'

runs a command on every host, as root. Host i is 10.99.0.(i + 1), named host<i>, in namespaces of its own for network,
host name and mounts. All of it lives in one more set of namespaces that the kernel takes down with this process,
however it ends: nothing on the machine's own network is touched, and nothing is left behind.
"""

import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

INSIDE = "CROSSOVER_JAX_LABORATORY"  # set for the process that holds the bridge
NEEDED = ("unshare", "nsenter", "ip", "tc", "mount", "hostname")
OWN = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
FOLDER = "/mnt"  # where the laboratory has a file system of its own, which goes with it
LIMIT = "root tbf rate {rate} burst {burst} latency 200ms"
BURST = 64 * 1024  # bytes that pass at once: a packet of TCP that the card would cut
TRIAL = (
    "set -e; hostname trial; ip link add trial0 type bridge; ip link add trial1 type veth peer name trial2; "
    f"mount -t tmpfs none {FOLDER}; tc qdisc add dev trial1 {LIMIT.format(rate='1mbit', burst=BURST)}"
)
# Waits for its interface, takes its name and its /etc/hosts, and becomes the command.
HOST = 'read -r _ && hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
CONGESTION = "reno"  # where BBR is the kernel's default, its probing makes transfers of a second vary by a fifth
# Of a burst: what a connection may queue, and what a packet may hold before the card cuts it. A link has one queue,
# not one for each connection as with fq_codel, the default of most systems. With the kernel's 4 MB, Gloo's "ready to
# receive" waits there behind all that its sender sends to others: six segments then take 1.1 to 1.5 times as long.
QUEUED, PACKET = 1 / 2, 1 / 4
# A connection that was idle goes on as fast as it was. Those of gossip are idle most of the time, each used in one
# round of many: starting slowly again, the kernel's default, made rounds of 0.87 s take 0.91 (permutes.py).
AFTER_IDLE = 0
BURST_S = 0.01  # how long the kernel may not get to a link without loss, where JAX runs on the hosts
ENDS = ("out", "err")
NETWORK = "10.99.0.0/24"
MAX_HOSTS = 250
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}  # per second


class Missing(Exception):
    """Something without which this machine can have no hosts."""


def bits_per_second(rate: str) -> float:
    """A rate as `tc` writes it.

    >>> bits_per_second("200mbit")
    200000000.0
    """
    for unit, factor in UNITS.items():
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise ValueError(f"a rate must end with one of {', '.join(UNITS)}, got {rate!r}.")


def address(host: int) -> str:
    return f"10.99.0.{host + 1}"


def check() -> None:
    """Raises `Missing`, in one line, where there can be no hosts."""
    if sys.platform != "linux":
        raise Missing(f"hosts need Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        raise Missing("hosts need root: network namespaces and rate limits are the kernel's")
    if lacking := [name for name in NEEDED if not shutil.which(name)]:
        raise Missing(f"hosts need {', '.join(lacking)} (packages util-linux and iproute2)")
    done = subprocess.run([*OWN, "--uts", "sh", "-c", TRIAL], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"hosts need namespaces, bridges, veth and tbf of this kernel: {done.stderr.strip()}")


def enter() -> None:
    """Run this very command in namespaces of its own, and end with it; returns in there. Raises `Missing`."""
    if INSIDE in os.environ and os.getpid() == 1:  # the first process of its namespace, not a program on a host
        ip("link set lo up")
        subprocess.run(["mount", "-t", "tmpfs", "none", FOLDER], check=True)
        return
    check()
    # The first process of a PID namespace takes all others with it. It goes with `unshare`, and that with this process.
    command = [*OWN, sys.executable, *sys.orig_argv[1:]]
    sys.exit(subprocess.call(command, env={**os.environ, INSIDE: "1"}, preexec_fn=_end_with_parent))


def _end_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def run(
    commands: Sequence[Sequence[str]],
    *,
    rate: str | None,
    burst: int = BURST,
    congestion: str = CONGESTION,
    tcp: Mapping[str, int] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> list[str]:
    """Run a command on each host, links limited to `rate` ("200mbit") in both directions; what each wrote to stdout.

    An idle link saves up to `burst` bytes, which then pass at once. On a busy machine it loses what it could have sent
    while the kernel did not get to it, but for those. `congestion` is the control of connections between hosts, one of
    net.ipv4.tcp_available_congestion_control, and `tcp` sets the kernel's net.ipv4.tcp_* on every host, without that
    prefix: {"slow_start_after_idle": 0}. Needs `enter`. Raises `RuntimeError` with the end of stderr where a command
    fails, and where it takes more than `timeout` seconds, after which all are killed, and `ValueError` for a rate, a
    setting or a number of hosts that cannot be.
    """
    _check_count(len(commands))
    tcp = {"limit_output_bytes": int(QUEUED * burst), "slow_start_after_idle": AFTER_IDLE, **(tcp or {})}
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder, contextlib.ExitStack() as opened:
        names = [f"{address(i)} host{i}\n" for i in range(len(commands))]
        pathlib.Path(folder, "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))
        ip("link add bridge0 type bridge", "link set bridge0 up")
        started: list[Host] = []
        try:
            for i, command in enumerate(commands):
                ends = [opened.enter_context(open(pathlib.Path(folder, f"{i}.{end}"), "w+")) for end in ENDS]
                started.append(_start(i, command, f"{folder}/hosts", ends, env or {}))
                plug(i, started[i].process.pid, rate, burst)
                _tune(started[i].process.pid, congestion, tcp)
            for host in started:
                host.process.stdin.write("go\n")
                host.process.stdin.close()
            _wait([host.process for host in started], timeout)
            for i, host in enumerate(started):
                if host.process.returncode:
                    raise RuntimeError(f"host {i} ended with {host.process.returncode}: {_whole(host.err)[-2000:]}")
            return [_whole(host.out) for host in started]
        finally:
            for host in started:
                host.process.kill()
                host.process.wait()
            ip("link del bridge0")
            for i in range(len(started)):  # a link goes with its host, but some time after it
                subprocess.run(["ip", "link", "del", f"port{i}"], capture_output=True)


def _check_count(hosts: int) -> None:
    if hosts > MAX_HOSTS:
        raise ValueError(f"`commands` must be for at most {MAX_HOSTS} hosts, got {hosts}.")


class Host(NamedTuple):
    process: subprocess.Popen
    out: Any
    err: Any


def _start(i: int, command: Sequence[str], names: str, ends: Sequence[Any], env: Mapping[str, str]) -> Host:
    """A host whose command waits for its link, and for a line on its stdin."""
    inside = ["unshare", "--net", "--uts", "--mount", "sh", "-c", HOST, f"host{i}", names, *command]
    out, err = ends
    process = subprocess.Popen(
        inside, stdin=subprocess.PIPE, stdout=out, stderr=err, text=True, env={**os.environ, **env}
    )
    return Host(process, out, err)


def _wait(processes: Sequence[subprocess.Popen], timeout: float) -> None:
    """Until all have ended or one has failed."""
    until = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
        if time.monotonic() > until:
            raise RuntimeError(f"`timeout` must be longer: after {timeout} s hosts are still at work")
        time.sleep(0.05)


def run_self(num_hosts: int, rate: str, **settings: Any) -> list[Any]:
    """`enter`, then `run` this very command on every host, with `--host i` behind it: JAX on CPUs.

    What the last line of each says as JSON. XLA has as many threads on each host as the machine has cores.
    """
    enter()
    commands = [[sys.executable, *sys.orig_argv[1:], "--host", str(i)] for i in range(num_hosts)]
    burst = max(BURST, int(BURST_S * bits_per_second(rate) / 8))
    env = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    outputs = run(commands, rate=rate, burst=burst, env=env, timeout=3600, **settings)
    return [json.loads(text.splitlines()[-1]) for text in outputs]


def sent_bytes() -> int:
    """Bytes of frames that this host has sent through its limit, headers included; 0 without a limit."""
    shown = subprocess.run(["tc", "-s", "qdisc", "show", "dev", "eth0"], capture_output=True, text=True, check=True)
    found = re.search(r"qdisc tbf .*?Sent (\d+) bytes", shown.stdout, re.DOTALL)
    return int(found[1]) if found else 0


def plug(i: int, pid: int, rate: str | None, burst: int) -> None:
    """Give the host with this process its link to the bridge."""
    _wait_for_namespace(pid)
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net"]
    ip(f"link add port{i} type veth peer name eth0 netns {pid}", f"link set port{i} master bridge0 up")
    ip(f"addr add {address(i)}/24 dev eth0", "link set lo up", inside=inside)
    ip(f"link set eth0 gso_max_size {min(1 << 16, int(PACKET * burst))} up", inside=inside)
    if rate:
        for where, device in (([], f"port{i}"), (inside, "eth0")):
            limit = f"tc qdisc add dev {device} {LIMIT.format(rate=rate, burst=burst)}"
            done = subprocess.run([*where, *limit.split()], capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"`rate` must be one that tc reads, as 200mbit, got {rate!r}: {done.stderr.strip()}")


def _tune(pid: int, congestion: str, tcp: Mapping[str, int]) -> None:
    """Of a route a namespace may choose any congestion control, of all its connections only a few."""
    inside, route = ["nsenter", f"--net=/proc/{pid}/ns/net"], f"ip route change {NETWORK} dev eth0 congctl"
    done = subprocess.run([*inside, *route.split(), congestion], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"`congestion` must be what this kernel has, got {congestion!r}: {done.stderr.strip()}")
    for name, value in tcp.items():
        write = [*inside, "tee", f"/proc/sys/net/ipv4/tcp_{name}"]
        done = subprocess.run(write, input=str(value), capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"`tcp` must be what a namespace may have, got {name} = {value!r}: {done.stderr.strip()}")


def _wait_for_namespace(pid: int) -> None:
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{pid}/ns/net") == own:
        time.sleep(0.001)


def ip(*commands: str, inside: Sequence[str] = ()) -> None:
    """Run commands of `ip`, behind what `inside` says: "nsenter" with the namespaces of a host."""
    for command in commands:
        subprocess.run([*inside, "ip", *command.split()], check=True)


def _whole(file) -> str:
    file.seek(0)
    return file.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--rate", help="of each link in each direction, as tc writes it: 200mbit; default: no limit")
    parser.add_argument("command", nargs="+", help="behind --")
    args = parser.parse_args()
    try:
        enter()
        outputs = run([args.command] * args.hosts, rate=args.rate)
    except (Missing, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    for i, text in enumerate(outputs):
        print("".join(f"host {i}: {line}\n" for line in text.splitlines()), end="")


if __name__ == "__main__":
    main()
