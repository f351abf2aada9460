"""Samplers: they carry noise at t=0 to data at t=1 along a velocity field.

`solve` runs them by name. A sampler sees a function `velocity_fn(x, t)`, never a module or a label;
`flowdcn_jax.flow.guidance` makes one from a model.
"""

from flowdcn_jax.samplers.solve import (
    DIFFUSIONS,
    OF_MEAN_VELOCITIES,
    SAMPLERS,
    check_diffusion,
    evaluation_times,
    num_evaluations,
    solve,
    time_grid,
)

__all__ = [
    "DIFFUSIONS",
    "OF_MEAN_VELOCITIES",
    "SAMPLERS",
    "check_diffusion",
    "evaluation_times",
    "num_evaluations",
    "solve",
    "time_grid",
]
