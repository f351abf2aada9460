"""Stopping when asked: after SIGTERM, SIGHUP or Ctrl-C the run saves a checkpoint and ends."""

import os
import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Knows, while it is entered, whether any process of the run was asked to stop.

    Clusters ask by SIGTERM, people by Ctrl-C (SIGINT), a terminal that is closed by SIGHUP. A
    second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self._asked = False
        self._handlers = {}

    def __enter__(self) -> "Preemption":
        wanted = {signal.SIGINT: self._on_interrupt}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            wanted[signal.SIGHUP] = self._on_hangup
        if jax.process_count() == 1:  # with several, jax.distributed catches SIGTERM itself
            wanted[signal.SIGTERM] = self._on_terminate
        self._handlers = {number: signal.signal(number, on) for number, on in wanted.items()}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            if handler is not None:  # one that Python did not install can't be put back
                signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """True at the step after which to save and stop; all processes agree on it."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)

    def _on_terminate(self, signum, frame) -> None:
        del signum, frame
        self._asked = True

    def _on_hangup(self, signum, frame) -> None:
        del signum, frame
        os.kill(os.getpid(), signal.SIGTERM)

    def _on_interrupt(self, signum, frame) -> None:
        del signum, frame
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not print: the signal may have come in the midst of one.
        os.write(2, b"\ninterrupted: saving; once more to stop without\n")
        os.kill(os.getpid(), signal.SIGTERM)
