"""Train one island of a run: a process of its own, which exchanges segments with others in the background.

    python -m experiments.island --config=experiments/configs/lm.py --roster=runs/islands/roster --name=a \\
        --workdir=runs/islands/a --bind=127.0.0.1:0 --plain_text

The config is that of `train.py`, for `config.num_workers` islands; of `config.crossover` it takes segments, wire and
`local_steps`. Learning rate and the end of the run follow the run's clock, the examples of all islands together. The
same command goes on after a death: from a peer's state, or from the checkpoint in --workdir if nobody is there.

workdir/metrics.jsonl   a row a line: own step, clock, loss, participation, step time
workdir/checkpoints     as of `train.py`, of this island alone
"""

import contextlib
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, logging
from absl import flags as absl_flags

if not __package__:  # as a script
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from crossover_jax import islands
from experiments import checkpoint, data, flags, processes
from experiments.checkpoint import Checkpoints, Damaged, NotSaved
from experiments.islands.program import IslandProgram, make_island_program
from experiments.program import place_workers
from experiments.resume import read
from experiments.settings import run_identity, versions
from experiments.step import Diverged, TrainState, fetch
from experiments.workdir import METRICS, append, locked, open_workdir

ROSTER = absl_flags.DEFINE_string("roster", None, "A directory, dns:NAME:PORT, or a=HOST:PORT,b=HOST:PORT.")
NAME = absl_flags.DEFINE_string("name", None, "Of this island: no other may have it.")
BIND = absl_flags.DEFINE_string("bind", "127.0.0.1:0", "host:port at which others reach this island.")
ADVERTISE = absl_flags.DEFINE_string("advertise", None, "host:port that others are told, if it is another.")
KEYS = absl_flags.DEFINE_string("keys", None, "The directory of `python -m crossover_jax islands keys`, for TLS.")
PLAIN_TEXT = absl_flags.DEFINE_bool("plain_text", False, "Without TLS: whoever reaches the port can change the model.")
FOUND = absl_flags.DEFINE_bool("found", None, "Begin the run from the seed; default: the roster's directory decides.")
PATIENCE = absl_flags.DEFINE_float("patience", 60.0, "Seconds after which who is away has gone.")
TIMEOUT = absl_flags.DEFINE_float("timeout", 10.0, "Seconds without progress after which a link has failed.")
PACE_MS = absl_flags.DEFINE_float("pace_ms", 0.0, "A step takes at least so long: stands for an accelerator's.")
STEP_LOG = absl_flags.DEFINE_string("step_log", None, "A file for a line of each step: time, clock, seconds, loss.")


MISTAKES = (
    *(ValueError, data.DataMissing, Diverged, NotSaved, processes.Disagreement),
    *(islands.NoState, islands.Superseded),
)


class Preempted(Exception):
    """This island was asked to end before the run has; the same command goes on."""


class Settings(NamedTuple):
    """Of one island, what is not in the config."""

    roster: islands.Roster
    name: str
    tls: islands.Tls | None
    bind: str
    advertise: str | None = None
    found: bool | None = None
    patience: float = 60.0
    timeout: float = 10.0
    pace: float = 0.0  # seconds
    step_log: str | None = None


def train(
    config: Any, workdir: str | pathlib.Path, settings: Settings, *, devices: Sequence[jax.Device] | None = None
) -> TrainState:
    """Train on `devices` (default: all) until the run's clock is at its end; this island's last state.

    Raises `ValueError` for settings that do not fit together, `data.DataMissing`, `islands.NoState` where there is
    nothing to begin with, `islands.Superseded` where a newer process has the name, `Diverged`, `NotSaved`, and
    `Preempted` after SIGTERM.
    """
    with contextlib.ExitStack() as stack:
        with processes.agreement() as fields:
            fields |= {**run_identity(config), "--name": settings.name}
            workdir = open_workdir(workdir)
            if processes.is_first():
                stack.enter_context(locked(workdir))
            alone = config.copy_and_resolve_references()
            with alone.unlocked():
                alone.num_workers, alone.batch_size = 1, config.batch_size // config.num_workers
            made = make_island_program(config, place_workers(alone, devices or jax.devices()))
        state, record = restored(workdir, made)
        island = islands.Island(
            settings.roster,
            settings.name,
            like=state.params,
            tls=settings.tls,
            bind=settings.bind,
            advertise=settings.advertise,
            patience=settings.patience,
            timeout=settings.timeout,
            seed=config.seed,
            **made.exchange,
        )
        stack.callback(island.leave)
        state = island.join(state, record and record["clock"], found=settings.found)
        processes.say(f"{island.life} begins from {island.status()['origin']}, at {island.clock:.0f} examples")
        return _Run(made, workdir, settings, island, record).run(state)


class _Run:
    """The loop of one island."""

    def __init__(
        self,
        made: IslandProgram,
        workdir: pathlib.Path,
        settings: Settings,
        island: islands.Island,
        record: dict[str, Any] | None,
    ):
        self.made, self.workdir, self.settings, self.island = made, workdir, settings, island
        self.own_step = record["step"] if record else 0
        self.seconds: list[tuple[float, float]] = []  # of each step since the last row: all of it, of the exchange
        self.unread: list[Any] = []

    def run(self, state: TrainState) -> TrainState:
        made, island, config = self.made, self.island, self.made.config
        batches = made.batches(island.life, island.clock)
        every = config.checkpoint.every
        saves = Checkpoints(self.workdir, config.checkpoint.keep) if every else None
        with processes.Preemption() as preemption, contextlib.closing(saves) if saves else contextlib.nullcontext():
            # The clock runs on while a row is written: whether this step was the last is asked once.
            is_last = island.clock >= made.total
            while not is_last and not preemption.reached(self.own_step):
                state = self.step(state, next(batches))
                is_last = island.clock >= made.total
                if is_last or self.own_step % config.log_every == 0:
                    self.row(made.evaluate(self.own_step, state) if is_last else {})
                if saves and self.own_step % every == 0:
                    self.save(saves, state)
            if saves:
                saves.wait()
                if saves.last != self.own_step:
                    self.save(saves, state)
                    saves.wait()
        if not is_last:
            raise Preempted(f"{island.life} ended at its step {self.own_step} by SIGTERM: the same command goes on.")
        return state

    def step(self, state: TrainState, batch: Any) -> TrainState:
        made, island, began = self.made, self.island, time.perf_counter()
        state, metrics = made.step(state, batch, self.own_step, made.rate(island.clock))
        self.own_step += 1
        jax.block_until_ready(self.unread[-1:])  # one step late, as in train.py
        self.unread.append(metrics)
        if self.settings.pace:
            jax.block_until_ready(metrics)
            time.sleep(max(0.0, self.settings.pace - (time.perf_counter() - began)))
        stepped = time.perf_counter()
        try:
            params = island.exchange(state.params, state, delivered=made.examples)
        except islands.LongAway as error:
            processes.say(str(error))
            return island.join(state, island.counts)  # should it be alone, its own state is what there is
        ended = time.perf_counter()
        self.seconds.append((ended - began, ended - stepped))
        if self.settings.step_log and processes.is_first():
            loss = float(np.mean(processes.fetch(metrics["loss"])))
            line = f"{time.time():.4f} {island.clock:.0f} {ended - began:.5f} {ended - stepped:.5f} {loss:.5f}\n"
            with open(self.settings.step_log, "a") as file:
                file.write(line)
        return state._replace(params=params)

    def row(self, more: dict[str, float]) -> None:
        """Add a row of metrics. Raises `Diverged`."""
        found = fetch(self.own_step - len(self.unread) + 1, self.unread, self.made.program.leaves)
        whole, exchange = np.array(self.seconds).T if self.seconds else np.zeros((2, 1))
        status = self.island.status()
        row = {
            "step": self.own_step,
            "clock": status["total"],
            "train/loss": float(found["loss"].mean()),
            "learning_rate": self.made.rate(status["total"]),
            "participation": status["exchanged"] / max(status["due"], 1),
            "islands": 1 + len(status["members"]),
            "distance": status["distance"],
            "step_seconds": float(np.median(whole)),
            "step_seconds_p99": float(np.quantile(whole, 0.99)),
            "exchange_seconds": float(np.median(exchange)),
            "errors": status["errors"],
            **more,
        }
        if processes.is_first():
            append(self.workdir / METRICS, json.dumps(row) + "\n")
        self.unread, self.seconds = [], []

    def save(self, saves: Checkpoints, state: TrainState) -> None:
        record = {
            "examples": int(self.island.clock),
            "rollbacks": 0,
            "num_workers": 1,
            "config": self.made.record,
            "provenance": versions(),
            "clock": self.island.counts,
            "best": None,
        }
        saves.save(self.own_step, state, record)


def restored(workdir: pathlib.Path, made: IslandProgram) -> tuple[TrainState, dict[str, Any] | None]:
    """The newest whole checkpoint and its record, or the first state."""
    first = made.init()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first)

    def attempt(step: int) -> tuple[TrainState, dict[str, Any]]:
        record, state = read(workdir, step, lambda record: like)
        return state, record

    def tell(step: int, error: Damaged) -> None:
        processes.say(f"WARNING: the checkpoint of step {step} is damaged: {error}")

    found, damaged = checkpoint.newest_whole(workdir, attempt, tell)
    if damaged and processes.is_first():
        checkpoint.set_aside(workdir, damaged)
    processes.failures(None)  # wait for it
    return found or (first, None)


def settings_of_flags() -> Settings:
    """Raises `ValueError` for flags that are missing."""
    if ROSTER.value is None or NAME.value is None or flags.WORKDIR.value is None:
        raise ValueError(
            "`--roster`, `--name` and `--workdir` must be given: where islands find each other, and this one."
        )
    if bool(KEYS.value) == PLAIN_TEXT.value:
        raise ValueError(
            "one of `--keys` and `--plain_text` must be given: what travels is encrypted, or said not to be."
        )
    tls = None
    if KEYS.value:
        tls = islands.Tls.of(KEYS.value, NAME.value)
    return Settings(
        islands.roster_of(ROSTER.value),
        NAME.value,
        tls,
        BIND.value,
        ADVERTISE.value,
        FOUND.value,
        PATIENCE.value,
        TIMEOUT.value,
        PACE_MS.value / 1e3,
        STEP_LOG.value,
    )


def main(argv: list[str]) -> None:
    """A user's mistake is one sentence."""
    del argv
    if not absl_flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    # The loop and the thread of the network share one interpreter. Who waits for it asks every 5 ms, unless told: that
    # would be a twelfth of a step of 60 ms.
    sys.setswitchinterval(5e-4)
    try:
        settings = settings_of_flags()
        flags.join_processes()
        train(flags.CONFIG.value, str(flags.WORKDIR.value), settings)
    except Preempted as error:
        processes.say(str(error))
        sys.exit(processes.PREEMPTED)
    except MISTAKES as error:
        logging.debug("", exc_info=True)
        processes.leave(f"error: {error}")
    except Exception:
        if jax.process_count() == 1:
            raise
        processes.leave(traceback.format_exc())


if __name__ == "__main__":
    app.run(main, flags_parser=flags.parse_flags)
