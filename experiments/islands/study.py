"""Islands beside SPMD gossip at equal delivered examples, calm and in a storm: what the lack of waiting costs.

    python -m experiments.islands.study fashion_mnist --out experiments/results/islands_fashion_mnist.csv --seeds 10
    python -m experiments.islands.study lm --out experiments/results/islands_lm.csv --seeds 5

Eight islands, or eight workers of `crossover_sgd`, with the same model, data, batch and learning rate, which was tuned
for the workers. Islands run in virtual time (`virtual.py`): a step takes a second, an exchange goes 50 ms each way.
The storm: one island five times slower for good, one killed and one stopped for 20 steps, one link down, all parted in
two halves for 30, 1 % of messages lost for 40, all but one killed for 20.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

import crossover_jax as cj
from experiments import csv_rows, data, processes
from experiments.configs import lm
from experiments.evaluate import make_evaluate
from experiments.islands.program import make_island_program
from experiments.islands.virtual import Event, World, distances, train
from experiments.program import make_program, steps_of, train_batches
from experiments.studies import lm_frontier, workers

DISTANCES = ("consensus_distance", "first_moments", "second_moments")
COLUMNS = ("arm", "seed", "accuracy", "loss", "bits_per_byte", *DISTANCES, "participation", "seconds", "code")
STORM = (
    Event(0.1, "slow", (0,), size=5.0),
    Event(0.2, "kill", (1,), 20.0),
    Event(0.3, "stop", (2,), 20.0),
    Event(0.4, "cut", (3,), 20.0),
    Event(0.5, "cut", (4, 5, 6, 7), 30.0),
    Event(0.6, "loss", (), 40.0, 0.01),
    Event(0.75, "kill", (1, 2, 3, 4, 5, 6, 7), 20.0),
)
SPMD = {"spmd": False, "spmd, each draws": True}  # whether examples are drawn by each worker
MAIN = ("spmd", "islands, three rounds", "islands, three rounds, storm")
ARMS: dict[str, tuple[int, int, World]] = {  # publications at every so many steps, and rounds of each
    "islands": (1, 1, World()),
    "islands, every 2": (2, 1, World()),
    "islands, three rounds": (1, 3, World()),
    "islands, storm": (1, 1, World(events=STORM)),
    "islands, three rounds, storm": (1, 3, World(events=STORM)),
}


def fashion_mnist() -> ml_collections.ConfigDict:
    """The perceptron of `studies/workers.py` with 8 workers, at the rate that was tuned for them there."""
    config = workers.get_config()
    config.num_workers, config.schedule.learning_rate = 8, 0.2
    return config


def adamw() -> ml_collections.ConfigDict:
    """The decoder of `configs/lm.py`, whole models in messages as on a mesh with one round."""
    config = lm.get_config()
    config.crossover.rounds, config.crossover.wire = 1, None
    return config


def gossip_adamw() -> ml_collections.ConfigDict:
    """The same with the second moment of the average gradient: each island estimates it by itself."""
    config = adamw()
    config.update_from_flattened_dict(lm_frontier.CORRECTED)
    return config


PROBLEMS: dict[str, Callable[[], ml_collections.ConfigDict]] = {
    "fashion_mnist": fashion_mnist,
    "lm": gossip_adamw,
    "lm_adamw": adamw,
}


def spmd(config: ml_collections.ConfigDict, each_draws: bool) -> dict[str, float]:
    """`train.py`'s run, its workers simulated; or with examples that each worker draws by itself."""
    train_set, eval_set = (
        data.load(config.dataset.name, split, data_dir=config.dataset.data_dir, sequence=config.dataset.sequence)
        for split in (config.dataset.train_split, config.dataset.eval_split)
    )
    num_steps = steps_of(config, train_set)
    program = make_program(config, train_set, config.num_workers, num_steps)
    state = cj.copies(program.init, config.num_workers)
    batches = train_batches(config, train_set, program.batch_part)
    if each_draws:
        own = [make_island_program(config).batches(f"another@{i}", 0.0) for i in range(config.num_workers)]
        batches = (jax.tree.map(lambda *parts: np.concatenate(parts), *parts) for parts in zip(*own, strict=True))
    for step, batch in zip(range(num_steps), batches, strict=False):
        state, metrics = program.step(state, program.place_batch([batch]), program.place_step(step))
        jax.block_until_ready(metrics)
    evaluate = make_evaluate(program.predict, program.algorithm, config.num_workers, each=False)
    return evaluate(num_steps, state, data.eval_batches(eval_set, batch_size=config.eval_batch_size)) | distances(state)


def main(argv: Sequence[str]) -> int:
    """Run what is missing in the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="CSV")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=MAIN, choices=[*SPMD, *ARMS], help="of %(choices)s")
    args = parser.parse_args(argv)
    done = {(row["arm"], int(row["seed"])) for row in csv_rows.read(args.out)}
    for seed in range(args.seeds):
        for arm in args.arms:
            if (arm, seed) in done:
                continue
            config, began = PROBLEMS[args.problem](), time.perf_counter()
            config.seed = seed
            if arm in SPMD:
                found = spmd(config, SPMD[arm])
            else:
                every, rounds, world = ARMS[arm]
                config.crossover.local_steps, config.crossover.rounds = every, rounds
                found = train(make_island_program(config), world, seed)
            row: dict[str, Any] = {
                "arm": arm,
                "seed": seed,
                "accuracy": round(100 * found["eval/mean/accuracy"], 3),
                "loss": round(found["eval/mean/loss"], 5),
                **{name: f"{found[name]:.3g}" for name in DISTANCES if name in found},
                "seconds": round(time.perf_counter() - began, 1),
                "code": processes.code_version(),
            }
            if config.dataset.name == "text":
                row["bits_per_byte"] = round(found["eval/mean/loss"] / np.log(2), 5)
            if "participation" in found:
                row["participation"] = round(found["participation"], 3)
            csv_rows.append(args.out, [row], COLUMNS)
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
