"""What saving costs: blocks of 50 steps of the default run, with and without a save, in alternation in one process.

    JAX_NUM_CPU_DEVICES=8 python -m benchmarks.checkpoints --blocks 20

A block with a save begins with it, so that the copy to the host is in it and the writing behind it: the save must have
ended within the block, else the block is as long as the save. The figure is the median over neighbouring blocks.
"""

import argparse
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np

import crossover_jax as cj
from experiments import data, program
from experiments.checkpoint import Checkpoints
from experiments.configs import fashion_mnist
from experiments.resume import as_json


def main(argv: Sequence[str]) -> None:
    """Print the seconds of all blocks, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20, help="of each kind")
    parser.add_argument("--steps", type=int, default=50, help="of a block: `config.checkpoint.every`")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args(argv)
    config = fashion_mnist.get_config()
    config.dataset.data_dir, config.model.name = args.data_dir, args.model
    if args.model != "resnet8":
        config.model.options = {}
    train_set = data.load(config.dataset.name, config.dataset.train_split, data_dir=args.data_dir)
    where = program.place_workers(config, jax.devices())
    setup = program.make_program(config, train_set, where, 10_000)
    state = cj.copies(setup.init, where, specs=setup.specs)
    single = program.train_batches(config, train_set, setup.batch_part)
    batches = (setup.place_batch([batch]) for batch in single)
    step, seconds, kinds = 0, {True: [], False: []}, itertools.cycle([True, False, False, True])
    with tempfile.TemporaryDirectory() as folder:
        saves = Checkpoints(pathlib.Path(folder), config.checkpoint.keep)
        for block in range(2 * args.blocks + 1):
            is_saving = next(kinds)
            began = time.perf_counter()
            if is_saving:
                record = {"config": as_json(config), "log": {"means": {"loss": [0.1] * 20}}, "provenance": {}}
                saves.save(step, state, record)
            waiting = None
            for _ in range(args.steps):
                state, metrics = setup.step(state, next(batches), setup.place_step(step))
                jax.block_until_ready(waiting)  # one step late, as in train.py
                waiting, step = metrics, step + 1
            jax.block_until_ready(state)
            if is_saving:
                saves.wait()
            if block:  # the first compiles
                seconds[is_saving].append(time.perf_counter() - began)
        saves.close()
    # Neighbours share the weather of a busy machine: with, without, without, with.
    ratios = [without / with_saves for with_saves, without in zip(seconds[True], seconds[False], strict=False)]
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    print(f"{len(jax.tree.leaves(state))} leaves, {size:.1f} MB; blocks of {args.steps} steps, seconds:")
    for kind, name in ((True, "with a save"), (False, "without")):
        print(f"  {name:12} median {np.median(seconds[kind]):.3f}  of", " ".join(f"{s:.2f}" for s in seconds[kind]))
    low, middle, high = 100 * (1 - np.quantile(ratios, [0.75, 0.5, 0.25]))
    print(f"saving takes {middle:.1f} % off steps/s (quartiles {low:.1f} and {high:.1f})")


if __name__ == "__main__":
    main(sys.argv[1:])
