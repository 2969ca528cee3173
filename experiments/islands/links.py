"""Links between islands that can be cut, halved and made lossy: network namespaces of this machine, by Linux' root."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from benchmarks.network import hosts

PORT = 7000
OBSERVER = "10.99.0.254"  # the address of whoever looks from outside, on the bridge
NOBODY = "02:00:00:00:00:01"  # no card has this address
HOLD = ["unshare", "--net", "--uts", "sleep", "infinity"]
# Kernels without netem have BPF: ld random; jge share; ret TC_ACT_OK; ret TC_ACT_SHOT.
DROP = "4,32 0 0 4294963256,53 0 1 {share},6 0 0 0,6 0 0 2"


class Links:
    """A network namespace for each island, on a bridge, its link limited to `rate` in both directions.

    To be used behind `hosts.enter`. Only what crosses the network is cut: a roster's directory stays where it was.
    """

    def __init__(self, names: Sequence[str], rate: str, processes: Sequence[subprocess.Popen]):
        self.rate, self._bits = rate, hosts.bits_per_second(rate)
        self._at = {name: i for i, name in enumerate(names)}
        self._pids = {name: process.pid for name, process in zip(names, processes, strict=True)}
        self._parted: list[tuple[str, str]] = []

    def inside(self, name: str) -> list[str]:
        """What stands before the command of an island."""
        return [shutil.which("nsenter") or "nsenter", f"--net=/proc/{self._pids[name]}/ns/net"]

    def address(self, name: str) -> str:
        """Where an island is bound."""
        return f"{hosts.address(self._at[name])}:{PORT}"

    def down(self, name: str) -> None:
        """Take an island's link away, as if its cable was pulled."""
        hosts.ip(f"link set port{self._at[name]} down")

    def halve(self, name: str) -> None:
        """Give an island's link half of its rate, in both directions."""
        self._limit(name, self._bits / 2)

    def lose(self, name: str, share: float) -> None:
        """Lose a share of the packets of an island's link, in both directions."""
        program = DROP.format(share=int(share * 2**32))
        for where, device in self._ends(name):
            self._tc(where, f"qdisc add dev {device} clsact")
            self._tc(where, f"filter add dev {device} ingress bpf direct-action bytecode", program)

    def repair(self, name: str) -> None:
        """Make an island's link as it was."""
        hosts.ip(f"link set port{self._at[name]} up")
        self._limit(name, self._bits)
        for where, device in self._ends(name):
            with contextlib.suppress(subprocess.CalledProcessError):  # there was no loss
                self._tc(where, f"qdisc del dev {device} clsact")

    def part(self, half: Sequence[str]) -> None:
        """Let nothing pass between these islands and the others: what they send goes to nobody."""
        others = [name for name in self._at if name not in half]
        self._parted = [(a, b) for one in half for other in others for a, b in ((one, other), (other, one))]
        for name, other in self._parted:
            self._neighbour("replace", name, other, f"lladdr {NOBODY} nud permanent")

    def heal(self) -> None:
        """Let all reach all again."""
        for name, other in self._parted:
            self._neighbour("del", name, other)
        self._parted = []

    def _neighbour(self, do: str, name: str, other: str, how: str = "") -> None:
        hosts.ip(f"neigh {do} {hosts.address(self._at[other])} {how} dev eth0", inside=self.inside(name))

    def _limit(self, name: str, bits: float) -> None:
        limit = hosts.LIMIT.format(rate=f"{bits:.0f}bit", burst=hosts.BURST)
        for where, device in self._ends(name):
            self._tc(where, f"qdisc change dev {device} {limit}")

    def _ends(self, name: str) -> list[tuple[list[str], str]]:
        return [([], f"port{self._at[name]}"), (self.inside(name), "eth0")]

    def _tc(self, where: Sequence[str], command: str, *more: str) -> None:
        subprocess.run([*where, "tc", *command.split(), *more], check=True, capture_output=True)


@contextlib.contextmanager
def linked(names: Sequence[str], rate: str) -> Iterator[Links]:
    """A link for each island; they are taken down at the end. Needs `hosts.enter`."""
    processes: list[subprocess.Popen] = []
    hosts.ip("link add bridge0 type bridge", f"addr add {OBSERVER}/24 dev bridge0", "link set bridge0 up")
    try:
        for i in range(len(names)):
            processes.append(subprocess.Popen(HOLD))
            hosts.plug(i, processes[i].pid, rate, hosts.BURST)
        yield Links(names, rate, processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        hosts.ip("link del bridge0")


def why_not() -> str:
    """Why this machine can have no links of its own; empty if it can, or has."""
    if hosts.INSIDE in os.environ:
        return ""
    try:
        hosts.check()
    except hosts.Missing as error:
        return str(error)
    return ""
