"""One run at a time in a workdir: two would delete each other's checkpoints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from flowdcn_jax.errors import UserError
from flowdcn_jax.runs.folder import lock


class WorkdirError(UserError, RuntimeError):
    """The workdir can't be written, or another run is at work in it; the message names that one."""


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir`; every process of the run enters it, the first one locks.

    See `folder.lock`.

    Raises:
        WorkdirError: in every process of the run.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock(workdir, error=WorkdirError))
            except WorkdirError as error:
                problem = f"{error}. Processes of one run need --distributed"
            except OSError as error:
                problem = f"{workdir} cannot be written: {error}"
        failed = bool(problem)
        if jax.process_count() > 1:
            failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
        if failed:
            problem = problem or f"{workdir} cannot be used, as process 0 says"
            raise WorkdirError(f"--workdir={problem}")
        yield
