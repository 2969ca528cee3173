"""Names of version 0.1, kept for one version: each still works and warns."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Old name at the top of the package -> where it is now.
MOVED = {
    "average_grads": "allreduce_sgd",
    "mean": "mean_over_workers",
    "mix_all": "mix_with_momentum",
    "worker": "one_worker",
}
POOLS = "Pool balanced base complete derangements exponential hypercube latin pull ring symmetric"
MOVED |= {name: f"topology.{name}" for name in f"{POOLS} cycle rotate sample shuffle stream".split()}


def renames(cut_at: int = -1, **new_names: str | None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take keywords by their old names; None: the argument is not needed any more.

    `cut_at` is the position of the cut, which came behind the table.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def accept(*args: Any, **kwargs: Any) -> R:
            if 0 <= cut_at < len(args) - 1 and type(args[cut_at + 1]).__name__ == "Cut":
                warn(
                    f"`{function.__name__}(..., table, cut)` is the order of version 0.1: pass the cut, then the table."
                )
                args = (*args[:cut_at], args[cut_at + 1], args[cut_at], *args[cut_at + 2 :])
            for old, new in new_names.items():
                if old in kwargs:
                    value = kwargs.pop(old)
                    instead = f"pass `{new}`" if new else "leave it out"
                    warn(f"`{function.__name__}({old}=...)` is the name of version 0.1: {instead}.")
                    kwargs |= {new: value} if new else {}
            return function(*args, **kwargs)

        return accept

    return decorate


def moved(package: Any, name: str) -> Any:
    """What an old name of the package stands for. Raises `AttributeError` for a name that never was."""
    if name in ("lars", "scale_by_trust_ratio"):
        raise AttributeError(f"`{name}` is no part of the library any more: it is in experiments/optimizers.py.")
    if name not in MOVED:
        raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
    warn(f"`crossover_jax.{name}` is the name of version 0.1: use `crossover_jax.{MOVED[name]}`.")
    return functools.reduce(getattr, MOVED[name].split("."), package)


def warn(message: str) -> None:
    warnings.warn(message, DeprecationWarning, stacklevel=3)
