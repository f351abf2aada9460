"""One run at a time in a workdir: two would delete each other's checkpoints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from flowdcn_jax.errors import UserError
from flowdcn_jax.runs.folder import lock
from flowdcn_jax.runs.processes import in_first_process


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

        def enter() -> None:
            try:
                stack.enter_context(lock(workdir, error=WorkdirError))
            except WorkdirError as error:
                raise WorkdirError(
                    f"--workdir={error}. Processes of one run need --distributed"
                ) from error
            except OSError as error:
                raise WorkdirError(f"--workdir={workdir} cannot be written: {error}") from error

        in_first_process(enter, error=WorkdirError)
        yield
