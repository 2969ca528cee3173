"""A profile of some steps of a run, in WORKDIR/profile: for TensorBoard's profile plugin, XProf or Perfetto."""

import contextlib
import pathlib
from typing import Any

import jax

from experiments import processes

FIRST, LAST = 10, 15  # of the steps of this process: behind what the first ones still set up


class Profile:
    """Records the programs that compute steps `FIRST` to `LAST`; of many processes the first one's."""

    def __init__(self, workdir: pathlib.Path, first_step: int, *, is_wanted: bool):
        self._folder = workdir / "profile"
        self._first, self._last = first_step + FIRST, first_step + LAST
        self._waits, self._is_on = is_wanted and processes.is_first(), False

    def named(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Around the call of the program whose last step is `step`."""
        if self._waits and step >= self._first:
            self._waits, self._is_on = False, True
            jax.profiler.start_trace(self._folder)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end(self, step: int, results: Any) -> None:
        """Stop where `step` is the last, once its `results` are there."""
        if self._is_on and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Stop, where the run ends earlier too."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            processes.say(f"profile of steps from {self._first} on in {self._folder}")
