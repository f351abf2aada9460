"""Time grids of the samplers."""

import numbers

import numpy as np


def uniform_times(num_steps: int, last_step: float | None = None) -> np.ndarray:
    """num_steps + 1 times from 0 to 1 (float64): evenly spaced up to 1 - last_step, then 1.

    Args:
        num_steps: number of steps, at least 1.
        last_step: length of the last step; 1 / num_steps unless given. The published runs of 50 and
            more steps used 0.04.

    Raises:
        ValueError: num_steps is no whole number or below 1, or last_step outside (0, 1].
    """
    if not isinstance(num_steps, numbers.Integral) or isinstance(num_steps, bool):
        raise ValueError(f"num_steps is {num_steps!r}; expected a whole number")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1")
    last_step = 1.0 / num_steps if last_step is None else last_step
    if not (isinstance(last_step, numbers.Real) and 0.0 < last_step <= 1.0):
        raise ValueError(f"last_step is {last_step!r}; expected a length in (0, 1]")
    if num_steps == 1:
        return np.array([0.0, 1.0])
    return np.append(np.linspace(0.0, 1.0 - last_step, num_steps), 1.0)


def shift_times(times: np.ndarray, shift: float) -> np.ndarray:
    """t / (shift - (shift - 1) * t): a shift above 1 moves times towards 0, the noise.

    There the steps are then shorter, which high resolutions want: their noise hides less of an
    image at the same t. 0 and 1 stay; 1 / shift is the reverse. It is the timestep shift of SD3
    (arXiv 2403.03206, equation 23), whose time runs the other way.

    Raises:
        ValueError: it is not a positive number.
    """
    if not (isinstance(shift, numbers.Real) and shift > 0 and np.isfinite(shift)):
        raise ValueError(f"time_shift is {shift!r}; expected a positive number")
    return times / (shift - (shift - 1) * times)
