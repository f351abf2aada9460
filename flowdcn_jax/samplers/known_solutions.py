"""Velocity fields whose solutions are known, to measure how fast a solver converges.

"late" (x' = 6 t^5 x) hardly moves at first, so that every solver shows its order. "normal" is the
exact flow from noise to normal data of mean 1 and deviation 1/2; there the low-order first steps of
Adams 3 and 4 leave a second-order error.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowdcn_jax.samplers.solve import solve

MEAN, DEVIATION = 1.0, 0.5  # of the normal data


class Field(NamedTuple):
    """A velocity field with a known solution."""

    velocity: Callable  # (x, t) -> velocity
    solution: Callable  # x at t=0 -> x at t=1


def _late_velocity(x, t):
    return 6 * t**5 * x


def _normal_velocity(x, t):
    variance = (t * DEVIATION) ** 2 + (1 - t) ** 2
    return MEAN + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MEAN)


FIELDS = {
    "late": Field(_late_velocity, lambda x: np.e * x),
    "normal": Field(_normal_velocity, lambda x: MEAN + DEVIATION * x),
}


def solver_error(field: Field, sampler: str, num_steps: int) -> float:
    """Largest error at t=1 over nine starts from -2 to 2, in float64."""
    with jax.enable_x64(True):
        x = jnp.linspace(-2.0, 2.0, 9, dtype=jnp.float64)
        found = solve(field.velocity, x, sampler=sampler, num_steps=num_steps)
        return float(jnp.abs(found - field.solution(x)).max())
