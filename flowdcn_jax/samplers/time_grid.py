"""Time grids of the samplers."""

import numpy as np


def uniform_times(num_steps: int, last_step: float | None = None) -> np.ndarray:
    """num_steps + 1 times from 0 to 1 (float32): evenly spaced up to 1 - last_step, then 1.

    Args:
        num_steps: number of steps, at least 1.
        last_step: length of the last step; 1 / num_steps unless given.

    Raises:
        ValueError: num_steps below 1, or last_step outside (0, 1].
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1")
    last_step = 1.0 / num_steps if last_step is None else last_step
    if not 0.0 < last_step <= 1.0:
        raise ValueError(f"last_step is {last_step}; expected a length in (0, 1]")
    return np.append(np.linspace(0.0, 1.0 - last_step, num_steps), 1.0).astype(np.float32)
