"""How far a run is: a bar with the time that is left on a terminal, a line each minute where there is none."""

import sys
import time

from tqdm import tqdm

from experiments import processes

INTERVAL = 60.0  # seconds between two lines


class Progress:
    """The log of a batch job gets lines, not the thousands of states of a bar; so does this process's own log file."""

    def __init__(self, first_step: int, num_steps: int, *, shown: bool):
        self._shown, self._is_terminal = shown, sys.stderr.isatty()
        self._step = self._told_step = first_step
        self._num_steps = num_steps
        self._told_at = time.perf_counter()
        self._values: dict[str, str] = {}
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not (shown and self._is_terminal),
        )

    def tick(self, steps: int) -> None:
        """Count steps, and tell of them if a minute has passed."""
        self._step += steps
        self._bar.update(steps)
        now = time.perf_counter()
        if self._shown and now - self._told_at >= INTERVAL:
            rate = (self._step - self._told_step) / (now - self._told_at)
            values = "".join(f", {name} {value}" for name, value in self._values.items())
            left = tqdm.format_interval((self._num_steps - self._step) / rate)
            processes.say(
                f"step {self._step} of {self._num_steps}, {100 * self._step / self._num_steps:.0f} %, "
                f"{rate:.3g} steps/s, {left} left{values}",
                shown=not self._is_terminal,
            )
            self._told_step, self._told_at = self._step, now

    def show(self, values: dict[str, str]) -> None:
        """What to tell beside the steps, from now on."""
        self._values = values
        self._bar.set_postfix(values)

    def write(self, line: str) -> None:
        """A line of its own, above the bar."""
        self._bar.write(line)

    def close(self) -> None:
        self._bar.close()
