"""Moving averages of the parameters: what their names mean, a step of each, one made of others.

An EMA at step T is a weighted mean of the parameters after steps 1 ... T:

- `constant_0.999`: those after step t weigh 0.999^(T-t), and the initial ones what that leaves,
  0.999^T, unless the decay is warmed up.
- `power_0.05`: those after step t weigh about t^g (EDM2, arXiv 2312.02696, section 3.1). The name
  gives the width of this profile, its standard deviation over T, from which g follows: the average
  is of the same share of any run, and the first step forgets the initial values.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAIN = "ema"  # the name of the one that config.ema.decay describes
MAX_WIDTH = 12**-0.5  # of the exponent 0: all parameters weigh the same
_NAME = re.compile(r"(constant|power)_(\d+|\d*\.\d+)")
_EXPECTED = (
    "names such as ('power_0.05', 'constant_0.999'), each of another average: power_WIDTH with a "
    f"width above 0 and up to {MAX_WIDTH:.4f}, constant_DECAY with a decay in [0, 1)"
)


class Average(NamedTuple):
    """One moving average: a constant decay, or a power function of a width."""

    kind: str  # "constant" or "power"
    value: float  # the decay, or the width


def parse_name(name: str) -> Average:
    """The average that a name stands for: `power_0.05`, `constant_0.999`.

    Raises:
        ValueError: it stands for none; the message says what was expected.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    average = Average(match[1], float(match[2])) if match else None
    if average is None or (average.kind == "constant" and average.value >= 1):
        raise ValueError(_EXPECTED)
    if average.kind == "power" and not 0 < average.value <= MAX_WIDTH:
        raise ValueError(_EXPECTED)
    return average


def parse_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names, once they are known to stand for averages of which no two are the same.

    Raises:
        ValueError: they do not; the message says what was expected.
    """
    if isinstance(names, str) or len({parse_name(name) for name in names}) < len(names):
        raise ValueError(_EXPECTED)
    return tuple(names)


def averages(config) -> dict[str, Average]:
    """All averages that `config` (config.ema) asks for, by name."""
    others = {name: parse_name(name) for name in config.others}
    return {MAIN: Average("constant", config.decay), **others}


def share(average: Average, step: jax.Array, *, warmup: float) -> float | jax.Array:
    """What the new parameters weigh in an EMA that they are added to: 1 - its decay.

    Args:
        average: which EMA.
        step: steps done before the one that gave the parameters.
        warmup: config.ema.warmup.

    Returns:
        float32; a Python float where it is the same in every step.
    """
    done = jnp.asarray(step, jnp.float32)
    if average.kind == "power":
        # 1 - (1 - 1/t)^(g+1), which in this form keeps its digits when 1/t is small.
        return -jnp.expm1((exponent(average.value) + 1) * jnp.log1p(-1 / (done + 1)))
    if not warmup:
        return 1.0 - average.value
    return jnp.maximum(1.0 - average.value, -jnp.expm1(-math.log(2) / (warmup * done)))


def exponent(width: float) -> float:
    """The g of the profile t^g whose standard deviation is `width` of its length.

    That is width^2 = (g + 1) / ((g + 2)^2 (g + 3)), a cubic of g (EDM2, appendix C).
    """
    square = width**-2.0
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def synthesis(
    width: float, step: int, snapshots: Sequence[tuple[float, int]]
) -> tuple[np.ndarray, float]:
    """How to make a power-function EMA out of snapshots of others (EDM2, section 3.2).

    The profile wanted is approached by a sum of those of the snapshots, in the least squares of
    profiles. Unlike in EDM2 the coefficients add up to 1, so that parameters that never moved come
    out as they are, however few snapshots there are.

    Args:
        width: of the profile wanted.
        step: at which it ends.
        snapshots: (width, step) of each, at steps up to `step`.

    Returns:
        (coefficients [n] float64, the length of what is missing from the profile over its own).
    """
    widths, steps = (np.array(column, np.float64) for column in zip(*snapshots, strict=True))
    ends = steps / step
    exponents = np.array([exponent(width) for width in widths])
    wanted = exponent(width)
    products = _inner(exponents[:, None], ends[:, None], exponents, ends)
    with_wanted = _inner(exponents, ends, wanted, 1.0)
    ones = np.ones((len(ends), 1))
    system = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])
    # Not `solve`: of snapshots by the hundred the system is singular to the last digits.
    solution, *_ = np.linalg.lstsq(system, np.append(with_wanted, 1.0), rcond=None)
    found = solution[:-1]
    norm = float(_inner(wanted, 1.0, wanted, 1.0))
    missing = norm - 2 * found @ with_wanted + found @ products @ found
    return found, math.sqrt(max(missing, 0.0) / norm)


def _inner(exponent_a, end_a, exponent_b, end_b) -> np.ndarray:
    """The inner product of two profiles (g + 1) / end * (t / end)^g on [0, end] (EDM2, C)."""
    later = np.where(end_a < end_b, exponent_b, exponent_a)
    ratio = np.minimum(end_a, end_b) / np.maximum(end_a, end_b)
    scale = (exponent_a + 1) * (exponent_b + 1) / (exponent_a + exponent_b + 1)
    return scale * ratio**later / np.maximum(end_a, end_b)
