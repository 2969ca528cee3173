"""The protocol beside a simulation of it that shares no line with it."""

import asyncio

import numpy as np
import pytest

from crossover_jax.islands.simulated import Network
from experiments.islands.sim import COORDINATES, CURVATURE, RATE, World, simulate
from tests.islands.helpers import SIZE, Values, run


class Descending(Values):
    """Values that follow noisy gradients of a quadratic."""

    def step(self):
        noise = self.rng.standard_normal(self.values.shape)
        self.values -= RATE * (np.tile(CURVATURE, SIZE // COORDINATES) * self.values + noise)
        super().step()


@pytest.mark.parametrize("slow", [0, 2])
def test_distance_and_progress_are_those_of_the_simulation(slow):
    async def scene():
        network = Network(latency=0.01, seed=0)
        names = [f"i{k}" for k in range(8)]
        islands = [
            await Descending(network, name, np.full((4, SIZE), 5.0), names, period=5.0 if k < slow else 1.0).start()
            for k, name in enumerate(names)
        ]
        squares, losses = [], []
        await asyncio.sleep(60)
        for _ in range(60):
            await asyncio.sleep(1)
            x = np.stack([island.values for island in islands])
            squares.append(np.mean((x - x.mean(0)) ** 2))
            losses.append(0.5 * np.mean(np.tile(CURVATURE, SIZE // COORDINATES) * x.mean(0) ** 2) * COORDINATES * 4)
        for island in islands:
            island.stop()
        return np.sqrt(np.mean(squares)), np.mean(losses), np.median([island.number for island in islands]) / 120

    distance, loss, steps = run(scene())
    of_seeds = [simulate(World(8, 4, latency=0.07, slow=slow), 120, seed) for seed in range(3)]
    assert distance == pytest.approx(np.mean([found.consensus for found in of_seeds]), rel=0.25)
    assert loss == pytest.approx(np.mean([found.loss for found in of_seeds]), rel=0.5)
    assert steps == pytest.approx(np.mean([found.steps for found in of_seeds]), rel=0.1)


def test_the_simulation_keeps_the_sum_and_deaths_move_it():
    calm = simulate(World(16, gradients=False, slow=2), 100)
    assert calm.drift < 1e-12
    assert calm.consensus < 0.01
    dying = simulate(World(16, gradients=False, deaths=0.01), 100)
    assert 0.01 < dying.drift < 0.25  # 0.25 = 1 / sqrt(16): of all values one would be left


def test_an_exchange_at_every_fifth_step_leaves_islands_further_apart():
    distances = [simulate(World(16, every=every), 200).consensus for every in (1, 5, 20)]
    assert distances == sorted(distances)
    assert distances[2] > 2 * distances[0]
