"""Rows of metrics for Weights & Biases, by its own library: `--wandb=PROJECT`, and `pip install wandb`."""

import importlib
import pathlib
import secrets
from typing import Any

from experiments import processes
from experiments.workdir import Row

ID = "wandb_id"  # in the workdir: a run that goes on is the same run there


def library() -> Any:
    """The module `wandb`. Raises `ValueError` where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"`--wandb` needs its library: `pip install wandb`, or leave it out; {error}.") from None


class Wandb:
    """The same rows as in metrics.jsonl and TensorBoard. What goes wrong with it is said, and the run goes on."""

    def __init__(self, project: str, workdir: pathlib.Path, title: str, config: dict[str, Any]):
        own = workdir / ID
        if not own.exists():
            own.write_text(secrets.token_hex(4))
        names = {"project": project, "name": workdir.name, "notes": title, "id": own.read_text(), "resume": "allow"}
        self._run = library().init(**names, dir=str(workdir), config=config)
        self._problem = ""

    def add(self, row: Row) -> None:
        self._try(self._run.log, {name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        self._try(self._run.finish)

    def _try(self, call: Any, *args: Any, **keys: Any) -> None:
        try:
            call(*args, **keys)
        except Exception as error:  # of a service and its library, on which no run may depend
            problem = f"WARNING: Weights & Biases did not take a row, the run goes on: {type(error).__name__}: {error}"
            if problem != self._problem:
                processes.say(problem)
            self._problem = problem
