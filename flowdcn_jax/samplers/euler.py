"""Euler's method for the probability-flow ODE."""

import jax
import jax.numpy as jnp
from jax import Array


def euler(velocity_fn, x_init: Array, y: Array, times: Array, key: Array | None = None) -> Array:
    """Integrates dx/dt = velocity_fn(x, t, y) from times[0] to times[-1] as one scan.

    Args:
        velocity_fn: (x [B,...], t [B], y [B]) -> velocity [B,...].
        x_init: x at times[0], [B,...] float32.
        y: labels, [B] integers.
        times: ascending times, [num_steps + 1] float32.
        key: unused, for this solver draws nothing; part of the signature that samplers share.

    Returns:
        x at times[-1], [B,...].
    """
    del key
    times = jnp.asarray(times, jnp.float32)

    def step(x, interval):
        start, end = interval
        t = jnp.full(x.shape[:1], start)
        return x + (end - start) * velocity_fn(x, t, y), None

    x, _ = jax.lax.scan(step, x_init, (times[:-1], times[1:]))
    return x
