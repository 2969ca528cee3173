"""How far apart workers are driven by their own noise, by what they exchange: a linear model of momentum SGD.

    python -m benchmarks.disagreement

64 workers, m <- 0.9 m + noise, x <- x − m, then so many rounds of gossip of x and of m, each with one random shift of
a pool of 12: the mean square of x_i − x̄ per coordinate, in a steady state, and what is sent, in float32 models a step.

Then segments, each with a shift of its own: coordinate by coordinate they change nothing, but noise of gradients is
much the same in many coordinates, for it lies along the directions in which the loss bends. Here it is the same in all,
and "along it" is the mean square of a worker's mean over coordinates: what its loss feels.
"""

import numpy as np

from crossover_jax.topology import latin

WORKERS, COORDINATES, STEPS, BETA = 64, 1000, 400, 0.9
INT8 = (1 + 4 / 256) / 4
MESSAGES = {"float32": (1, [(1, 0)]), "bfloat16": (0.5, [(2, 0), (1, 1)]), "int8": (INT8, [(3, 0), (2, 1), (3, 1)])}


def main() -> None:
    pool = latin(WORKERS, 12)
    matrices = [pool.matrix(p) for p in range(pool.num_rounds)]
    print("wire      rounds of x  of m   models sent   mean square")
    for wire, (size, choices) in MESSAGES.items():
        for of_x, of_m in choices:
            found = disagreement(matrices, of_x, of_m)
            print(f"{wire:9} {of_x:11} {of_m:5} {size * (of_x + of_m):13.2f} {found:13.2f}")
    print("\nsegments   mean square   along the noise")
    for segments in (1, 4, 16, 64):
        each, along = of_segments(matrices, segments)
        print(f"{segments:8} {each:13.2f} {along:17.2f}")


def disagreement(matrices: list[np.ndarray], of_x: int, of_m: int) -> float:
    rng = np.random.default_rng(0)
    x, m = np.zeros((2, WORKERS, COORDINATES))
    found = []
    for step in range(STEPS):
        m = BETA * m + rng.normal(size=m.shape)
        x = x - m
        for _ in range(of_m):
            m = matrices[rng.integers(len(matrices))] @ m
        for _ in range(of_x):
            x = matrices[rng.integers(len(matrices))] @ x
        if step >= STEPS // 4:
            found.append(np.square(x - x.mean(0)).mean())
    return float(np.mean(found))


def of_segments(matrices: list[np.ndarray], segments: int, repeats: int = 20) -> tuple[float, float]:
    """All coordinates of a segment have the same noise and the same rounds, so one of each stands for them."""
    rng = np.random.default_rng(0)
    x, m = np.zeros((2, WORKERS, repeats, segments))
    each, along = [], []
    for step in range(STEPS):
        m = BETA * m + rng.normal(size=(WORKERS, repeats, 1))
        mixed = rng.integers(len(matrices), size=(repeats, segments))
        x = np.einsum("rsij,jrs->irs", np.stack(matrices)[mixed], x - m)
        if step >= STEPS // 4:
            apart = x - x.mean(0)
            each.append(np.square(apart).mean())
            along.append(np.square(apart.mean(-1)).mean())
    return float(np.mean(each)), float(np.mean(along))


if __name__ == "__main__":
    main()
