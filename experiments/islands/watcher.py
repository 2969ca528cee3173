"""Looks at all islands of a run from outside, again and again, and now and then evaluates the mean of them."""

import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from crossover_jax import islands
from crossover_jax.islands.stream import LinkError
from experiments.islands.measures import View, view_clock
from experiments.islands.program import IslandProgram

LOOK_S, MEAN_S = 1.0, 5.0  # seconds between two looks, and at least between two evaluations of the mean
SHARE = 0.05  # of the time that evaluations may take: islands share these cores
TIMEOUT_S = 2.0  # that an island has to answer


class Watcher:
    """`views` are what `islands.look` has found, and `means` what the mean of all islands does on held-out data."""

    def __init__(self, roster: str, made: IslandProgram, log: pathlib.Path):
        self.views: list[tuple[float, View]] = []
        self.means: list[dict[str, float]] = []
        self._roster, self._log = islands.roster_of(roster), log
        self._made, self._first = made, made.init()

    def run(self, over: threading.Event) -> None:
        due = time.monotonic() + MEAN_S
        while not over.wait(LOOK_S):
            self.look()
            if (began := time.monotonic()) > due:
                self.evaluate()
                due = time.monotonic() + max(MEAN_S, (time.monotonic() - began) / SHARE)

    def look(self) -> None:
        view = islands.look(self._roster, tls=None, timeout=TIMEOUT_S)
        at = time.time()
        self.views.append((at, view))
        with open(self._log, "a") as file:
            file.write(json.dumps({"at": at, "view": view}) + "\n")

    def evaluate(self) -> None:
        at, clock = time.time(), view_clock(self.views[-1][1]) if self.views else 0.0
        try:
            mean = islands.gather_mean(self._roster, like=self._first.params, tls=None, timeout=TIMEOUT_S)
        except LinkError:
            return  # nobody is there, for now
        row = self._made.evaluate(0, self._first._replace(params=mean))
        self.means.append(
            {"at": at, "clock": clock, "loss": row["eval/mean/loss"], "accuracy": row["eval/mean/accuracy"]}
        )


@contextlib.contextmanager
def watching(roster: str, made: IslandProgram, log: pathlib.Path) -> Iterator[Watcher]:
    """Watch in a thread of its own, until the end of the block; what failed there is raised here."""
    watcher, over = Watcher(roster, made, log), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watcher.run, over)
        try:
            yield watcher
        finally:
            over.set()
        watched.result()
