"""Does a run go on as well on another number of workers? Paired over seeds, against the run that was never resized.

    python -m experiments.trials.resize --seeds 6 --out resize.csv

Each seed trains N workers for 500 steps; from their checkpoint of step 200 M workers go on. What is compared is the
loss of the averaged model on the test set 50 steps later, in the middle of the schedule, and at its end: same data,
same order, same initialisation. Cells that are in the file are not run again.
"""

import argparse
import itertools
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence

import ml_collections
import numpy as np

from experiments import checkpoint, csv_rows, train
from experiments.configs import fashion_mnist
from experiments.intervals import interval
from experiments.paths import local_path
from experiments.resume import MATRICES, SAME, Resume

PAIRS = [(8, 4), (4, 8), (8, 1), (1, 8), (8, 6), (6, 8)]
BEFORE, MIDDLE, END = 200, 250, 500  # steps; 250 are an epoch
COLUMNS = [
    *("workers", "resumed_on", "how", "seed"),
    *(f"loss_{who}_{step}" for step in (MIDDLE, END) for who in ("resumed", "undisturbed")),
]


def main(argv: Sequence[str]) -> int:
    """Run what is missing, print a table; 1 if an interval of the differences does not contain 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--algorithm", default="crossover")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    try:
        out = local_path("--out", args.out)
    except ValueError as error:
        parser.error(str(error))
    rows = csv_rows.read(out)
    done = {(int(r["workers"]), int(r["resumed_on"]), r["how"], int(r["seed"])) for r in rows}
    for seed, workers in itertools.product(range(args.seeds), sorted({n for n, _ in PAIRS})):
        wanted = [(n, m, how, seed) for (n, m), how in itertools.product(PAIRS, MATRICES) if n == workers]
        if missing := [cell for cell in wanted if cell not in done]:
            new = compare(args, workers, seed, missing)
            csv_rows.append(out, new, COLUMNS)
            rows += new
    return report(rows, args.seeds)


def compare(args: argparse.Namespace, workers: int, seed: int, cells: list) -> list[dict]:
    """The rows of these cells, all from one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        undisturbed = losses_of(make_config(args, workers, seed), root / "begun")
        for later in (step for step in checkpoint.steps(root / "begun") if step > BEFORE):
            shutil.rmtree(root / "begun" / checkpoint.FOLDER / str(later))

        def row(cell: tuple) -> dict:
            shutil.copytree(root / "begun", root / "resumed")
            resumed = losses_of(make_config(args, cell[1], seed), root / "resumed", Resume(cell[2]))
            shutil.rmtree(root / "resumed")
            losses = [x[step] for step in (MIDDLE, END) for x in (resumed, undisturbed)]
            return dict(zip(COLUMNS, (*cell, *losses), strict=True))

        return [row(cell) for cell in cells]


def make_config(args: argparse.Namespace, workers: int, seed: int) -> ml_collections.ConfigDict:
    """A perceptron, with batches that 8 and 6 workers divide."""
    config = fashion_mnist.get_config()
    config.seed = seed
    if args.algorithm in config and "seed" in config[args.algorithm]:
        config[args.algorithm].seed = seed
    config.num_workers, config.simulate, config.batch_size = workers, "yes", 240
    config.dataset.data_dir, config.algorithm = args.data_dir, args.algorithm
    config.model.name, config.model.options = "mlp", ml_collections.ConfigDict({"hidden": (64,)})
    config.steps, config.checkpoint.every, config.checkpoint.keep = END, BEFORE, 100  # all
    return config


def losses_of(config: ml_collections.ConfigDict, workdir: pathlib.Path, resume: Resume = SAME) -> dict[int, float]:
    """The averaged model's loss by steps."""
    _, rows = train.train(config, workdir, resume=resume)
    return {row["step"]: row["eval/mean/loss"] for row in rows if "eval/mean/loss" in row}


def report(rows: list[dict], seeds: int) -> int:
    """A table of differences with their 95 % intervals; 1 if one in the middle of the schedule does not contain 0."""
    wrong = 0
    print(f"workers   how       difference at step {MIDDLE}          at step {END}")
    for (n, m), how in itertools.product(PAIRS, MATRICES):
        own = [r for r in rows if (int(r["workers"]), int(r["resumed_on"]), r["how"]) == (n, m, how)][:seeds]
        cells = []
        for step in (MIDDLE, END):
            resumed, undisturbed = (
                np.array([float(r[f"loss_{who}_{step}"]) for r in own]) for who in ("resumed", "undisturbed")
            )
            difference = interval(resumed - undisturbed)
            holds = abs(difference.mean) <= difference.half
            wrong |= step == MIDDLE and not holds
            mark = " " if holds else "*"
            cells.append(f"{difference.mean:+.4f} ± {difference.half:.4f} of {undisturbed.mean():.3f}{mark}")
        print(f"{n} -> {m}    {how:8}  {'   '.join(cells)}")
    print("*: the 95 % interval does not contain 0")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
