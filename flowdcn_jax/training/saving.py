"""When a checkpoint is due by the clock, and the one that is saved when a run fails."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import jax

from flowdcn_jax.faults import as_line
from flowdcn_jax.runs.checkpointer import SaveError
from flowdcn_jax.runs.processes import first_says
from flowdcn_jax.training.metrics import NonFiniteError


class SaveClock:
    """Wall time since the last checkpoint; process 0's counts for all."""

    def __init__(self, every_minutes: float | None):
        """None: never due."""
        self._every_s = None if every_minutes is None else 60 * every_minutes
        self.restart()

    def restart(self) -> None:
        """A checkpoint is saved."""
        self._start_s = time.monotonic()

    def due(self) -> bool:
        """All processes call it at the same steps."""
        if self._every_s is None:
            return False
        return first_says(time.monotonic() - self._start_s >= self._every_s)


@contextlib.contextmanager
def saved_on_failure(save: Callable[[], int]) -> Iterator[None]:
    """Whatever ends the block, the state of the last finished step is saved first, if it can be.

    Not after a loss that is not finite, nor if it was a save that failed. Of several processes one
    that fails cannot save: the others are in the next step, whose result never comes. They go on
    from the last checkpoint.

    Args:
        save: saves it, once it is known to be finite, and returns its step.
    """
    try:
        yield
    except (NonFiniteError, SaveError):
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            try:
                logging.warning("%s: saved step %d first", as_line(error), save())
            except Exception as problem:
                logging.warning("the last step could not be saved: %s", as_line(problem))
        raise
