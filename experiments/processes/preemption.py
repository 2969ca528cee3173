"""SIGTERM ends all processes of a run at one step."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # exit code, EX_TEMPFAIL: start the same command again


class Preemption:
    """While it is entered, SIGTERM asks all processes to end at one step boundary; a second one ends at once.

    Of many processes JAX's coordination service takes the signal, from the first one on, and agrees on the step: there
    a second signal ends at once only after that.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> "Preemption":
        self._is_main = threading.current_thread() is threading.main_thread()
        self._before = signal.getsignal(signal.SIGTERM)
        if self._is_main and jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main and jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether the run is to end after `step`; True on all processes for the same one."""
        if jax.process_count() > 1 and not self._asked and multihost_utils.reached_preemption_sync_point(step):
            self._asked = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._asked

    def _ask(self, *_: object) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
