"""Run a training job of several processes on this machine, with CPU devices, over Gloo.

    python experiments/launch/local.py --processes 4 --devices-per-process 2 -- --workdir=runs/local --config.steps=20
    python experiments/launch/local.py --processes 4 --restarts 3 --shrink -- --workdir=runs/local
    python experiments/launch/local.py --islands 4 --restarts 3 -- --workdir=runs/islands

What follows `--` goes to `train.py`. The exit code is that of the first process that fails, else 0; of one that a
signal killed it is 128 + the signal.

With `--restarts` all processes start again, and go on from the last checkpoint of `--workdir`, when one was killed or
the job was preempted: not after an error that `train.py` reports, which would come again. With `--shrink` they do so on
the processes that are left, with as many workers each as before. SIGTERM goes on to the processes, which write a
checkpoint and end, and nothing is restarted; a second one kills them.

With `--islands` each process is an island, `island.py`, or with `--processes` each so many are one. It has a name (a,
b, c …) and a folder of that name below `--workdir`, where they also have their roster. They talk on this machine alone:
in plain text, which its other users can reach, or with `--keys`. An island that was killed, or ended by a SIGTERM of
its own, is started again alone, up to `--restarts` times, and the others do not notice. The exit code is that of the
first one that stays away, else 0.
"""

import argparse
import collections
import contextlib
import itertools
import os
import pathlib
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

TRAIN = pathlib.Path(__file__).resolve().parents[1] / "train.py"
ISLAND = TRAIN.with_name("island.py")
PREEMPTED = 75  # as in experiments/processes/preemption.py, which would import JAX here
POLL = 0.1  # seconds; who fails between two looks has failed at once
# Linux kills a process that asks for it when its parent dies: what was killed by SIGKILL leaves no processes behind.
# Asked for by the child itself, before it becomes train.py: `preexec_fn` would run between fork and exec, where the
# threads of an imported JAX may hold locks.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Shape(NamedTuple):
    """How much a job runs on, and what must stay divisible when it shrinks."""

    processes: int
    workers: int
    devices: int  # of each process
    batch_size: int
    eval_batch_size: int
    micro_batches: int = 1
    tensor: int = 1  # devices that hold a part of the model each, and see the same examples


def main(argv: Sequence[str]) -> int:
    """Run the job, again and again as long as the flags and its failures allow; the exit code."""
    args = parse(argv)
    shape = read_shape(args) if args.shrink else None
    with terminations() as asked:
        try:
            return run_islands(args, asked) if args.islands else run_with_restarts(args, shape, asked)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


def run_with_restarts(args: argparse.Namespace, shape: Shape | None, asked: Sequence[int]) -> int:
    """The exit code of the last run; each but the first goes on where the one before it left its checkpoint."""
    num_processes, train_flags, restart = args.processes, args.train_flags, 0
    while True:
        blamed = to_blame(run(train_flags, num_processes, args, asked))
        code, restart = next(iter(blamed.values()), 0), restart + 1
        if asked or restart > args.restarts or not is_passing(code):
            return exit_code(code)
        note = f"{described(blamed)}; restart {restart} of {args.restarts}"
        if shape and was_killed(code):
            smaller = shrunk(shape, len(blamed))
            if smaller is None:
                say(f"{described(blamed)}; nothing is left that could train")
                return exit_code(code)
            note += f" with {difference(shape, smaller, len(blamed))}"
            shape, num_processes = smaller, smaller.processes
            new = {"config.num_workers": str(shape.workers), "resume_workers": "overlap"}
            train_flags = replaced(train_flags, new)
        say(note)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The launcher's own flags, and `train_flags`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="default: 2; of an island 1")
    parser.add_argument("--islands", type=int, default=0, help="so many islands instead of the processes of one job")
    parser.add_argument("--devices-per-process", type=int, help="default: 4; of an island 1")
    parser.add_argument("--grace", type=float, default=120, help="seconds that the others have once one has failed")
    parser.add_argument("--restarts", type=int, default=0, help="how often to start again; default: not at all")
    parser.add_argument("--shrink", action="store_true", help="start again without the processes that were killed")
    parser.add_argument("train_flags", nargs="*", metavar="-- train.py's flags")
    args = parser.parse_args(argv)
    if args.shrink and args.restarts < 1:
        parser.error("--shrink needs --restarts of at least 1")
    if args.islands and args.shrink:
        parser.error("--shrink is for processes of one job: islands that are left go on by themselves")
    if args.islands and value_of(args.train_flags, "workdir") is None:
        parser.error("--islands needs a --workdir behind --, below which each island has a folder")
    args.processes = args.processes or (1 if args.islands else 2)
    args.devices_per_process = args.devices_per_process or (1 if args.islands else 4)
    return args


def read_shape(args: argparse.Namespace) -> Shape:
    """What `train.py` would make of its flags; a config that cannot be loaded ends this process with one line."""
    if not __package__:  # as a script
        sys.path[0] = str(TRAIN.parents[1])
    from experiments import flags  # which imports JAX, so only where it is needed

    flags.parse_flags([str(TRAIN), *args.train_flags])
    config = flags.CONFIG.value
    return Shape(
        args.processes,
        config.num_workers,
        args.devices_per_process,
        config.batch_size,
        config.eval_batch_size,
        config.micro_batches,
        config.inner.tensor,
    )


@contextlib.contextmanager
def terminations() -> Iterator[list[int]]:
    """The SIGTERMs that come inside the block, which this process survives."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def run(
    train_flags: Sequence[str], num_processes: int, args: argparse.Namespace, asked: Sequence[int]
) -> dict[int, int]:
    """Start the processes, and leave none behind: what `wait_for` returns."""
    environment, port, processes = environment_of(args), free_port(), []
    try:
        for i in range(num_processes):
            line = dying_with_us(command(train_flags, port, num_processes, i))
            processes.append(subprocess.Popen(line, env=environment))
        return wait_for(processes, args.grace, asked)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """With which each process is started."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices_per_process)}


def command(train_flags: Sequence[str], port: int, num_processes: int, process_id: int) -> list[str]:
    """The command line of one process."""
    by_hand = [f"--coordinator=localhost:{port}", f"--num_processes={num_processes}", f"--process_id={process_id}"]
    program = TRAIN if value_of(train_flags, "roster") is None else ISLAND
    return [sys.executable, str(program), *train_flags, *by_hand]


def dying_with_us(line: list[str]) -> list[str]:
    """A command that becomes `line`, and on Linux ends with this process."""
    if sys.platform != "linux":
        return line
    return [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *line]


def free_port() -> int:
    """A port that nobody listens to now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def wait_for(processes: Sequence[subprocess.Popen], grace: float, asked: Sequence[int] = ()) -> dict[int, int]:
    """Wait for all; the return codes of those that failed first, by process: several if they did so at once.

    The others are killed `grace` seconds after them. Signals that appear in `asked` go on to all processes; whoever
    is alive at the second one is killed.
    """
    first, deadline, passed_on = {}, float("inf"), 0
    while True:
        codes = [process.poll() for process in processes]
        if not first and any(codes):
            first = {i: code for i, code in enumerate(codes) if code}
            deadline = time.monotonic() + grace
        if None not in codes:
            return first
        if passed_on < len(asked):
            for process in processes:
                process.send_signal(asked[passed_on])
            passed_on += 1
        if passed_on > 1 or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(POLL)


def to_blame(failed: Mapping[int, int]) -> dict[int, int]:
    """Of processes that failed at once, those that did not fail because of the others.

    Who loses a peer ends with an error, or aborts: JAX does so when its coordinator is gone.

    >>> to_blame({0: -6, 1: -9, 2: 1})
    {1: -9}
    >>> to_blame({0: 1, 1: -6})
    {0: 1}
    """
    for likely in (was_killed, is_preempted, is_error):
        if found := {i: code for i, code in failed.items() if likely(code)}:
            return found
    return dict(failed)


def was_killed(code: int) -> bool:
    """Whether a signal ended the process; one that aborts has ended itself, and would run again in its place."""
    return code < 0 and code != -signal.SIGABRT


def is_preempted(code: int) -> bool:
    """Whether the process wrote a checkpoint and ended because it got SIGTERM."""
    return code == PREEMPTED


def is_error(code: int) -> bool:
    """Whether the process reported an error."""
    return code > 0


def is_passing(code: int) -> bool:
    """Whether the same command may end otherwise the next time."""
    return code < 0 or is_preempted(code) or code == exit_code(-signal.SIGKILL)  # as a launcher says it


def exit_code(code: int) -> int:
    """What a shell makes of a return code.

    >>> exit_code(75), exit_code(-9)
    (75, 137)
    """
    return code if code >= 0 else 128 - code


def shrunk(shape: Shape, dead: int) -> Shape | None:
    """The most of the remaining processes that can train, each with as many workers as before; None if none can.

    >>> shrunk(Shape(4, 8, devices=2, batch_size=256, eval_batch_size=1024), dead=1)[:2]
    (2, 4)
    """
    for processes in range(shape.processes - dead, 0, -1):
        if not misfit(shape, processes):
            return shape._replace(processes=processes, workers=shape.workers * processes // shape.processes)
    return None


def misfit(shape: Shape, processes: int) -> str:
    """Why so many processes, with as many workers each as in `shape`, cannot train; empty if they can.

    >>> misfit(Shape(4, 8, devices=2, batch_size=256, eval_batch_size=1024), 3)
    '3 processes would be 6 workers, which do not divide the batch of 256'
    >>> misfit(Shape(4, 2, devices=2, batch_size=256, eval_batch_size=1024), 3)
    '3 processes would be 1.5 workers'
    """
    workers, part = divmod(shape.workers * processes, shape.processes)
    reason = f"{counted(processes, 'process')} would be {shape.workers * processes / shape.processes:g} workers"
    if part:
        return reason
    if shape.batch_size % (workers * shape.micro_batches):
        times = f" times {shape.micro_batches} micro-batches" if shape.micro_batches > 1 else ""
        return f"{reason}, which{times} do not divide the batch of {shape.batch_size}"
    sharing = processes * shape.devices // shape.tensor
    for size in (shape.batch_size, shape.eval_batch_size):
        if size % sharing:
            return f"{reason} of {sharing} devices, which do not divide the batch of {size}"
    return ""


def difference(before: Shape, after: Shape, dead: int) -> str:
    """What has become of a job, in a few words."""
    reason = misfit(before, before.processes - dead)
    return (
        f"{after.processes} of {counted(before.processes, 'process')} and {after.workers} of "
        f"{counted(before.workers, 'worker')}" + (f" ({reason})" if reason else "")
    )


def run_islands(args: argparse.Namespace, asked: Sequence[int]) -> int:
    """Run islands until all have ended; the exit code of the first that stayed away, else 0."""
    alive: dict[str, subprocess.Popen] = {}
    restarts: collections.Counter[str] = collections.Counter()
    failed, deadline, passed_on = 0, float("inf"), 0

    def start(name: str) -> None:
        line = island_command(args.train_flags, name, args.islands)
        if args.processes > 1:  # a job of its own: what ends one of them ends that island
            own = {"processes": args.processes, "devices-per-process": args.devices_per_process, "grace": args.grace}
            line = [line[0], __file__, *(f"--{key}={value}" for key, value in own.items()), "--", *line[2:]]
        line = dying_with_us(line)
        alive[name] = subprocess.Popen(line, env=environment_of(args))

    try:
        for name in itertools.islice(island_names(), args.islands):
            start(name)
        while alive:
            for name, code in [(name, process.poll()) for name, process in alive.items()]:
                if code is None:
                    continue
                del alive[name]
                if is_passing(code) and not asked and restarts[name] < args.restarts:
                    restarts[name] += 1
                    say(f"island {name} {described_island(code)}; restart {restarts[name]} of {args.restarts}")
                    start(name)
                else:
                    failed = failed or code
                    if code and not asked:
                        say(f"island {name} {described_island(code)}; the others go on")
            if passed_on < len(asked):
                for process in alive.values():
                    process.send_signal(asked[passed_on])
                passed_on, deadline = passed_on + 1, min(deadline, time.monotonic() + args.grace)
            if passed_on > 1 or time.monotonic() > deadline:
                for process in alive.values():
                    process.kill()
            time.sleep(POLL)
        return exit_code(failed)
    finally:
        for process in alive.values():
            process.kill()
            process.wait()


def island_names() -> Iterator[str]:
    """Names that a certificate can bear, in the order of the alphabet.

    >>> list(itertools.islice(island_names(), 28))[-3:]
    ['z', 'aa', 'ab']
    """
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_lowercase, repeat=length))


def island_command(flags: Sequence[str], name: str, islands: int) -> list[str]:
    """The command line of one island, of whose `--workdir` all have a part; what is said in `flags` stays."""
    folder = pathlib.Path(str(value_of(flags, "workdir")))
    own = {"workdir": str(folder / name), "name": name}
    unless_said = {"roster": str(folder / "roster"), "config.num_workers": str(islands)}
    own |= {flag: value for flag, value in unless_said.items() if value_of(flags, flag) is None}
    text = [] if value_of(flags, "keys") is not None else ["--plain_text"]
    return [sys.executable, str(ISLAND), *replaced(flags, own), *text]


def described_island(code: int) -> str:
    """How an island ended.

    >>> described_island(-9), described_island(75), described_island(1)
    ('was killed by SIGKILL', 'was preempted', 'ended with 1')
    """
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return "was preempted" if is_preempted(code) else f"ended with {code}"


def value_of(flags: Sequence[str], name: str) -> str | None:
    """The last value that a flag has; None if it has none.

    >>> value_of(["--workdir=runs/a", "--keys", "runs/keys"], "keys")
    'runs/keys'
    """
    found, rest = None, iter(flags)
    for flag in rest:
        own, equals, value = flag.partition("=")
        if flag.startswith("-") and own.lstrip("-") == name:
            found = value if equals else next(rest, None)
    return found


def replaced(flags: Sequence[str], new: Mapping[str, str]) -> list[str]:
    """The flags with `new` values, by name, instead of what they had.

    >>> replaced(["--workdir=runs/a", "--config.num_workers", "8"], {"config.num_workers": "6"})
    ['--workdir=runs/a', '--config.num_workers=6']
    """
    kept, rest = [], iter(flags)
    for flag in rest:
        name, equals, _ = flag.partition("=")
        if not (flag.startswith("-") and name.lstrip("-") in new):
            kept.append(flag)
        elif not equals:
            next(rest, None)  # its value
    return [*kept, *(f"--{name}={value}" for name, value in new.items())]


def described(blamed: Mapping[int, int]) -> str:
    """Who failed, and how.

    >>> described({1: -9, 2: -9})
    'processes 1, 2 were killed by SIGKILL'
    >>> described({0: 75, 1: 75})
    'the job was preempted'
    """
    if any(map(is_preempted, blamed.values())):
        return "the job was preempted"
    who = f"process{'es' * (len(blamed) > 1)} {', '.join(map(str, blamed))} {'were' if len(blamed) > 1 else 'was'}"
    return f"{who} killed by {', '.join(dict.fromkeys(signal.Signals(-code).name for code in blamed.values()))}"


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "process"), counted(2, "process"), counted(2, "worker")
    ('1 process', '2 processes', '2 workers')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def say(message: str) -> None:
    """To the terminal, apart from what the processes print."""
    print(f"local.py: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
