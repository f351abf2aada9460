"""Stopping when the cluster asks: after SIGTERM the run saves a checkpoint and ends."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Knows whether this process, or any other of the run, was sent SIGTERM."""

    def __init__(self):
        self._asked = False
        if jax.process_count() == 1:  # with several, jax.distributed catches the signal itself
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum, frame) -> None:
        del signum, frame
        self._asked = True

    def reached(self, step: int) -> bool:
        """True at the step after which to save and stop; all processes agree on it."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)
