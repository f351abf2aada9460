"""Euler-Maruyama: the same marginals as the ODE, with fresh noise at each step.

On the linear path the score is s(x, t) = (t*v - x) / (1 - t): what the general formula
(alpha/alpha' * v - x) / (sigma^2 - alpha/alpha' * sigma' * sigma) gives for alpha = t and
sigma = 1 - t. A step of length d adds, with a diffusion coefficient beta(t) and normal noise,

    drift * beta * s * d + sqrt(noise * beta * d) * normal

to the ODE's v*d. The last step is the ODE's, so that the image carries no fresh noise.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from flowdcn_jax.samplers.kept import scan_states


class Variant(NamedTuple):
    """Factors of the score's drift and of the noise's variance; noise = 2*drift is an exact SDE."""

    drift: float
    noise: float


VARIANTS = {
    "euler_sde": Variant(drift=1.0, noise=2.0),
    "euler_sde_mean": Variant(drift=1.0, noise=0.0),  # the mean of each step; no noise at all
    "euler_sde_preserve": Variant(drift=0.5, noise=1.0),  # half the diffusion
}

# beta(t) / (1 - t): with it neither the score nor beta * score is ever divided by 1 - t = 0.
DIFFUSIONS = {
    "sigma": lambda t: jnp.ones_like(t),  # beta = sigma(t) = 1 - t, as published
    "constant": lambda t: 1 / (1 - t),  # beta = 1
    "zero": lambda t: jnp.zeros_like(t),  # beta = 0: the ODE
}


def integrate(
    velocity_fn,
    x_init: Array,
    times: np.ndarray,
    draw_noise: Callable[[Array], Array],
    *,
    variant: Variant,
    diffusion: str,
    keep: Sequence[int] | None = None,
) -> Array:
    """x at times[-1] = 1, as one scan.

    Args:
        velocity_fn: (x [B,...], t scalar) -> velocity [B,...].
        x_init: x at times[0] = 0, [B,...].
        times: [num_steps + 1], ascending.
        draw_noise: number of the step (traced) -> standard normal noise, shaped as x_init.
        variant: one of VARIANTS.
        diffusion: one of DIFFUSIONS.
        keep: numbers of times, ascending: x at each of them is given, [len(keep),B,...].
    """
    dtype = x_init.dtype
    num_steps = len(times) - 1

    def step(x, row):
        i, t, length = row
        velocity = velocity_fn(x, t).astype(dtype)
        moved = x + length * velocity
        ratio = jnp.where(i < num_steps - 1, DIFFUSIONS[diffusion](t), 0)  # 0: the ODE's last step
        moved = moved + length * variant.drift * ratio * (t * velocity - x)
        if variant.noise:
            deviation = jnp.sqrt(variant.noise * ratio * (1 - t) * length)
            moved = moved + deviation * draw_noise(i).astype(dtype)
        return moved, moved

    rows = (
        jnp.arange(num_steps),
        jnp.asarray(times[:-1], dtype),
        jnp.asarray(np.diff(times), dtype),
    )
    x, kept = scan_states(step, x_init, rows, x_init, keep)
    return x if keep is None else kept
