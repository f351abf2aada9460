"""The samplers by name, and the one function that runs them."""

import functools
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flowdcn_jax.samplers import schemes, sde
from flowdcn_jax.samplers.neural_coefficients import NEURAL_COEFFICIENTS
from flowdcn_jax.samplers.time_grid import shift_times, uniform_times

ODE_SCHEMES = {
    "euler": schemes.euler,
    "heun": schemes.heun,
    "heun_cached": schemes.heun_cached,
    "adams1": functools.partial(schemes.adams, order=1),
    "adams2": functools.partial(schemes.adams, order=2),
    "adams3": functools.partial(schemes.adams, order=3),
    "adams4": functools.partial(schemes.adams, order=4),
    "neural": schemes.neural,
    "mean_flow": schemes.mean_flow,
}
SAMPLERS = (*ODE_SCHEMES, *sde.VARIANTS)
"""The samplers by name; docs/sampling.md says what each is."""

OF_MEAN_VELOCITIES = ("mean_flow",)
"""Samplers of mean velocities; the others take velocities at a time."""

DIFFUSIONS = tuple(sde.DIFFUSIONS)
"""The diffusion coefficients of the SDE samplers by name."""

SHORTEST_STEP = float(np.finfo(np.float32).eps)  # a shorter one is none at all near t=1


def solve(
    velocity_fn,
    x_init: Array,
    *,
    sampler: str,
    num_steps: int,
    last_step: float | None = None,
    time_shift: float = 1.0,
    diffusion: str | None = None,
    key: Array | None = None,
    step_noise: Array | None = None,
    keep: Sequence[int] | None = None,
) -> Array:
    """Carries noise x_init at t=0 to data at t=1 along dx/dt = velocity_fn(x, t).

    It is one scan, which may be compiled and in which `velocity_fn` is traced once.

    Args:
        velocity_fn: (x [B,...], t, a scalar of x's dtype) -> velocity [B,...]; for the sampler
            "mean_flow" (x, t, r) -> the mean velocity from t to r.
        x_init: [B,...] float32.
        sampler: one of SAMPLERS.
        num_steps: steps of the time grid; the evaluations may be more: `num_evaluations`.
        last_step: length of the last step; 1 / num_steps unless given.
        time_shift: moves the times towards the noise if above 1; see `time_grid.shift_times`.
        diffusion: beta(t) of the SDE samplers: "sigma" (1 - t, published, the default), "constant"
            (1) or "zero".
        key: for the SDE samplers' noise: one key for all, or a key a row of x_init, [B], so that a
            row's noise does not depend on the other rows; as jax.random.key makes them.
        step_noise: [num_steps, *x_init.shape], used instead of drawn noise; the last step's is
            ignored, since that step is the ODE's.
        keep: the trajectory: numbers of steps, ascending, 0 being x_init and num_steps the result.

    Returns:
        x at t=1, [B,...]; with `keep`, x after each of these steps, [len(keep),B,...], at the times
        `time_grid(...)[keep]`.

    Raises:
        ValueError: an unknown name or a value out of range (see `time_grid`, `check_diffusion`),
            an SDE sampler without key and step_noise, or one of them of another shape or kind;
            numbers to keep that are not steps, or not in order.
    """
    times = time_grid(sampler, num_steps, last_step=last_step, time_shift=time_shift)
    check_diffusion(sampler, diffusion)
    if keep is not None and list(keep) != sorted(set(keep) & set(range(num_steps + 1))):
        raise ValueError(f"keep is {keep!r}; expected ascending numbers from 0 to {num_steps}")
    if sampler in ODE_SCHEMES:
        return schemes.integrate(velocity_fn, x_init, ODE_SCHEMES[sampler](times), keep=keep)
    return sde.integrate(
        velocity_fn,
        x_init,
        times,
        _noise_source(sampler, num_steps, x_init, key, step_noise),
        variant=sde.VARIANTS[sampler],
        diffusion=diffusion or "sigma",
        keep=keep,
    )


def time_grid(
    sampler: str, num_steps: int, *, last_step: float | None = None, time_shift: float = 1.0
) -> np.ndarray:
    """The ends of a sampler's steps: [num_steps + 1] float64 from 0 to 1.

    Raises:
        ValueError: an unknown sampler; num_steps, last_step or time_shift out of range, or times
            that do not increase with them; or the neural solver with a number of steps, or a grid,
            that it was not searched for.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    if sampler != "neural":
        times = shift_times(uniform_times(num_steps, last_step), time_shift)
        if not np.diff(times).min() > SHORTEST_STEP:
            raise ValueError(
                f"last_step is {last_step} and time_shift is {time_shift}; expected values that "
                f"leave each of the {num_steps} steps more than {SHORTEST_STEP:.1e} of t"
            )
        return times
    if not isinstance(num_steps, numbers.Integral) or num_steps not in NEURAL_COEFFICIENTS:
        choices = ", ".join(map(str, NEURAL_COEFFICIENTS))
        raise ValueError(f"num_steps is {num_steps!r}; the sampler 'neural' has one of {choices}")
    if last_step is not None or time_shift != 1:
        raise ValueError(
            f"last_step is {last_step} and time_shift is {time_shift}; expected neither, since the "
            "sampler 'neural' has its own time grid"
        )
    return schemes.neural_times(num_steps)


def check_diffusion(sampler: str, diffusion: str | None) -> None:
    """Raises ValueError for an unknown diffusion, or for one that the sampler does not use."""
    if diffusion is None:
        return
    if diffusion not in DIFFUSIONS:
        raise ValueError(f"diffusion is {diffusion!r}; expected one of {', '.join(DIFFUSIONS)}")
    if sampler not in sde.VARIANTS:
        raise ValueError(
            f"diffusion is {diffusion!r} and the sampler {sampler!r}; it belongs to "
            f"{', '.join(sde.VARIANTS)}"
        )


def evaluation_times(
    sampler: str, num_steps: int, *, last_step: float | None = None, time_shift: float = 1.0
) -> np.ndarray:
    """The t of each evaluation of the velocity, in order: [num_evaluations] float32.

    Raises:
        ValueError: as `time_grid` does.
    """
    times = time_grid(sampler, num_steps, last_step=last_step, time_shift=time_shift)
    if sampler in ODE_SCHEMES:
        return ODE_SCHEMES[sampler](times).times.astype(np.float32)
    return times[:-1].astype(np.float32)


def num_evaluations(sampler: str, num_steps: int) -> int:
    """How often `solve` evaluates the velocity: num_steps; 2*num_steps - 1 for "heun".

    Raises:
        ValueError: as `time_grid` does.
    """
    return len(evaluation_times(sampler, num_steps))


def _noise_source(sampler: str, num_steps: int, x_init: Array, key, step_noise):
    """A function from the number of a step to its noise."""
    if step_noise is not None:
        expected = (num_steps, *x_init.shape)
        if step_noise.shape != expected:
            raise ValueError(
                f"step_noise has shape {step_noise.shape}; expected [num_steps, *x_init.shape] = "
                f"{expected}"
            )
        return lambda i: jnp.asarray(step_noise)[i]
    if key is None:
        raise ValueError(f"the sampler {sampler!r} draws noise; expected a key or step_noise")
    if not (isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        found = f"{key.dtype}{list(key.shape)}" if isinstance(key, Array) else repr(key)
        raise ValueError(f"key is {found}; expected what jax.random.key gives (not PRNGKey)")
    if key.shape == ():
        return lambda i: jax.random.normal(jax.random.fold_in(key, i), x_init.shape)
    if key.shape != x_init.shape[:1]:
        raise ValueError(f"key has shape {key.shape}; expected () or {x_init.shape[:1]}")

    def draw(i):
        keys = jax.vmap(jax.random.fold_in, (0, None))(key, i)
        return jax.vmap(lambda k: jax.random.normal(k, x_init.shape[1:]))(keys)

    return draw
