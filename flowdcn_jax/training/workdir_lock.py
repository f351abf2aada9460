"""One run at a time in a workdir: two would delete each other's checkpoints."""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from flowdcn_jax.errors import UserError

LOCK_FILE = ".lock"


class WorkdirError(UserError, RuntimeError):
    """The workdir can't be written, or another run is at work in it; the message names that one."""


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir`; every process of the run enters it, the first one locks.

    The system lets go of the lock when the process ends, however it does. On a file system without
    locks a warning says so.

    Raises:
        WorkdirError: in every process of the run.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        if jax.process_index() == 0:
            try:
                # So opened, the file that another run has written stays as it is.
                file = stack.enter_context((workdir / LOCK_FILE).open("a+", encoding="utf-8"))
                problem = _try_lock(file)
            except OSError as error:
                problem = f"cannot be written: {error}"
        failed = bool(problem)
        if jax.process_count() > 1:
            failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
        if failed:
            problem = problem or "cannot be used, as process 0 says"
            raise WorkdirError(f"--workdir={workdir} {problem}")
        yield


def _try_lock(file) -> str:
    """Locks the open file and writes into it who did; returns what keeps it from that, or ''."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "just starting"
        return (
            f"is in use by another run ({holder}); expected one at a time: wait for it, or name "
            "another folder. Processes of one run need --distributed"
        )
    except OSError as error:  # some network file systems have no locks
        logging.warning("%s cannot be locked: start no second run there (%s)", file.name, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return ""
