"""Samplers: they carry noise at t=0 to data at t=1 along a velocity field.

A sampler is a function `(velocity_fn, x_init, y, times, key) -> x` of a velocity field
`velocity_fn(x, t, y)`, noise, labels, a time grid and a random key. It never sees a module.
"""

from flowdcn_jax.samplers.euler import euler
from flowdcn_jax.samplers.time_grid import uniform_times

__all__ = ["euler", "uniform_times"]
