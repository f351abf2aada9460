"""What the processes of a job agree on: what the first does for all, and what any of them met."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from flowdcn_jax.errors import UserError


def in_first_process(action: Callable[[], object], *, error: type[UserError] = UserError) -> None:
    """Calls `action` in process 0; if it raises a UserError there, every process raises one.

    All processes call it at the same place; the others wait.

    Args:
        action: what one process does.
        error: what the others raise.
    """
    problem = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as raised:
            problem = raised
    if not first_says(problem is not None):
        return
    raise problem or error("process 0 had to stop; its own message says why")


def highest(here: int) -> int:
    """The highest of what the processes have here, in all of them."""
    if jax.process_count() == 1:
        return here
    return int(multihost_utils.process_allgather(np.asarray(here)).max())


def first_list(here: list[int]) -> list[int]:
    """The numbers that process 0 has here, in all processes."""
    if jax.process_count() == 1:
        return here
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(here))))
    numbers = np.resize(np.asarray([*here, 0], np.int64), count)
    return [int(number) for number in multihost_utils.broadcast_one_to_all(numbers)]


def first_says(here: bool) -> bool:
    """What process 0 has here; all processes get its answer."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(here)))
