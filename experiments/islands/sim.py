"""Islands as events in numpy: a second implementation to test against, and to plan with.

    python -m experiments.islands.sim --islands 16 --every 1 5 --slow 5 --latency 0.5

One event per finished step; the unit of time is the median step of a healthy island. Nothing here is the library's
code: an exchange is a line, and a message takes an exponential time. Loss is that of a quadratic with noisy gradients.
"""

import argparse
import heapq
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crossover_jax.text import as_table

COORDINATES = 4  # of a segment
CURVATURE = np.geomspace(0.2, 1.0, COORDINATES)
RATE = 0.1


class World(NamedTuple):
    """Speeds and links; `slow` islands take `slowness` times as long, and `deaths` is a rate per island and unit."""

    islands: int = 16
    segments: int = 8
    every: int = 1
    latency: float = 0.1  # of a whole exchange, in steps
    jitter: float = 0.2  # of the logarithm of a step's time
    slow: int = 0
    slowness: float = 5.0
    deaths: float = 0.0
    gradients: bool = True  # False: values are only exchanged, and begin apart


class Found(NamedTuple):
    """What came out; drift is how far the mean of all has moved where there are no gradients."""

    steps: float  # of the median island in a unit of time
    participation: float  # exchanges of a segment and publication
    consensus: float  # root mean square distance to the mean, over the second half
    loss: float  # of the mean, over the second half
    drift: float


def simulate(world: World, time: float, seed: int = 0) -> Found:
    """Run for so long."""
    return _Simulation(world, seed).run(time)


class _Simulation:
    def __init__(self, world: World, seed: int):
        self.world, self.rng = world, np.random.default_rng(seed)
        shape = (world.islands, world.segments, COORDINATES)
        self.x = np.full(shape, 5.0) if world.gradients else self.rng.standard_normal(shape)
        self.first = self.x.mean(0)
        self.offered = self.x.copy()
        self.free = np.ones(shape[:2], bool)  # packed after the last difference was added, and not yet taken
        self.arriving: list[list[tuple[float, int, np.ndarray]]] = [[] for _ in range(world.islands)]
        self.speed = np.exp(0.1 * self.rng.standard_normal(world.islands))
        self.speed[: world.slow] *= world.slowness
        self.life = np.zeros(world.islands, int)
        self.alive = np.ones(world.islands, bool)
        self.steps = np.zeros(world.islands, int)
        self.exchanged, self.due = 0, 0

    def run(self, until: float) -> Found:
        events = [(self.duration(i), i, 0) for i in range(self.world.islands)]
        if self.world.deaths:
            events += [(self.rng.exponential(1 / self.world.deaths), i, -1) for i in range(self.world.islands)]
        heapq.heapify(events)
        squares, losses, look_at = [], [], until / 2
        while events[0][0] < until:
            now, i, life = heapq.heappop(events)
            if life == -1:
                self.die(i)
                heapq.heappush(events, (now + self.rng.exponential(20.0), i, -2))
            elif life == -2:
                self.join(i)
                heapq.heappush(events, (now + self.duration(i), i, self.life[i]))
                heapq.heappush(events, (now + self.rng.exponential(1 / self.world.deaths), i, -1))
            elif self.alive[i] and life == self.life[i]:
                self.step(i, now)
                heapq.heappush(events, (now + self.duration(i), i, life))
            if now >= look_at:
                look_at = now + 1
                living = self.x[self.alive]
                mean = living.mean(0)
                squares.append(np.mean((living - mean) ** 2))
                losses.append(0.5 * np.sum(CURVATURE * mean**2))
        for i in range(self.world.islands):
            self.add_arrived(i, np.inf)
        drift = np.sqrt(np.mean((self.x[self.alive].mean(0) - self.first) ** 2))
        return Found(
            float(np.median(self.steps) / until),
            self.exchanged / max(self.due, 1),
            float(np.sqrt(np.mean(squares))),
            float(np.mean(losses)),
            float(drift),
        )

    def duration(self, i: int) -> float:
        return self.speed[i] * np.exp(self.world.jitter * self.rng.standard_normal())

    def step(self, i: int, now: float) -> None:
        if self.world.gradients:
            noise = self.rng.standard_normal(self.x[i].shape)
            self.x[i] -= RATE * (CURVATURE * self.x[i] + noise)
        self.steps[i] += 1
        if self.steps[i] % self.world.every:
            return
        self.add_arrived(i, now)
        waiting = [k for _, k, _ in self.arriving[i]]
        self.offered[i], self.free[i] = self.x[i], True
        self.free[i, waiting] = False
        self.due += self.world.segments
        others = np.flatnonzero(self.alive & (np.arange(self.world.islands) != i))
        if len(others):
            for k in range(self.world.segments):
                self.ask(i, k, others, now)

    def ask(self, i: int, k: int, others: np.ndarray, now: float, tries: int = 4) -> None:
        if not self.free[i, k]:
            return
        for j in self.rng.permutation(others)[:tries]:
            if self.free[j, k]:
                at = now + self.rng.exponential(self.world.latency)
                half = (self.offered[j, k] - self.offered[i, k]) / 2
                for island, difference in ((i, half), (j, -half)):
                    self.arriving[island].append((at, k, difference))
                    self.free[island, k] = False
                self.exchanged += 2
                return

    def add_arrived(self, i: int, now: float) -> None:
        for at, k, difference in self.arriving[i]:
            if at <= now:
                self.x[i, k] += difference
        self.arriving[i] = [arrival for arrival in self.arriving[i] if arrival[0] > now]

    def die(self, i: int) -> None:
        self.alive[i], self.free[i], self.arriving[i] = False, False, []
        self.life[i] += 1

    def join(self, i: int) -> None:
        self.x[i] = self.offered[self.rng.choice(np.flatnonzero(self.alive))]
        self.alive[i] = True


def main(argv: Sequence[str]) -> int:
    """Print a table of what to expect, a row for each `--every`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--islands", type=int, default=16)
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--latency", type=float, default=0.1, help="of an exchange, in steps")
    parser.add_argument("--slow", type=int, default=0, help="islands that are five times slower")
    parser.add_argument("--deaths", type=float, default=0.0, help="of an island in a step")
    parser.add_argument("--time", type=float, default=300.0, help="steps")
    args = parser.parse_args(argv)
    rows = []
    for every in args.every:
        world = World(args.islands, args.segments, every, args.latency, slow=args.slow, deaths=args.deaths)
        found = simulate(world, args.time)
        figures = (found.steps, found.participation, found.consensus, found.loss)
        rows.append((f"{every}", *(f"{figure:.3f}" for figure in figures)))
    print(as_table(("every", "steps per unit", "participation", "distance", "loss of the mean"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
