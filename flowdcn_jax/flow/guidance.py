"""Guidance: the velocity of a model for given labels, moved away from that of a weaker guess.

    guided = weak + w(t) * (strong - weak)

strong is the model's velocity for the labels. weak is the same model's without a class
(classifier-free guidance), or that of another, weaker model for the same labels (autoguidance,
arXiv 2406.02507). w = 1 is no guidance.
"""

import math
import numbers

import jax
import jax.numpy as jnp
from jax import Array

CHANNELS = ("all", "three")
SCHEDULES = {  # from w = 1 at t=0 to w = scale at t=1, or w = scale throughout
    "constant": lambda t: jnp.ones_like(t),
    "linear": lambda t: t,
    "cosine": lambda t: (1 - jnp.cos(math.pi * t)) / 2,
}


def guided_velocity(
    model,
    y: Array,
    *,
    null_class: int,
    scale: float,
    channels: str = "all",
    interval: tuple[float, float] | None = None,
    schedule: str = "constant",
    guide=None,
):
    """velocity_fn(x, t) of `model` for labels y, with guidance.

    The two velocities of classifier-free guidance come from one evaluation of twice the batch. No
    guidance (scale 1, or t outside the interval) costs a single evaluation of the batch:
    `guided_at` says when.

    Args:
        model: (x [B,...], t [B], y [B]) -> velocity [B,...]; of mean velocities (x, t, y, r [B]).
        y: labels, [B] integers.
        null_class: the label that stands for "no class".
        scale: guidance weight w (published FIDs use 1.375).
        channels: "all", or "three": only the first three channels are guided and the others are
            strong's, as in DiT's and SiT's code.
        interval: (low, high): guidance while low <= t <= high, none outside (arXiv 2404.07724).
        schedule: of w over t: "constant", or rising from 1 at t=0 to `scale` at t=1: "linear", or
            "cosine", which rises slowly at both ends (arXiv 2404.13040).
        guide: another function like `model`, whose velocity for y is weak, instead of the model's
            for `null_class`.

    Returns:
        A function (x [B,...], t scalar) -> velocity [B,...]; of mean velocities (x, t, r scalar),
        of which t decides about guidance.

    Raises:
        ValueError: see `check_guidance`.
    """
    check_guidance(scale=scale, channels=channels, interval=interval, schedule=schedule)

    def evaluate(network, x, y, t, *until):
        t, *until = (jnp.broadcast_to(time, y.shape) for time in (t, *until))
        return network(x, t, y, *until)

    def strong_alone(x, *times):
        return evaluate(model, x, y, *times)

    def strong_and_weak(x, *times):
        if guide is not None:
            return strong_alone(x, *times), evaluate(guide, x, y, *times)
        # Each image beside its twin: one after the other, the two halves of a batch that is split
        # over devices would have to change places at every evaluation.
        twice_x, twice_y = _interleave(x, x), _interleave(y, jnp.full_like(y, null_class))
        both = evaluate(model, twice_x, twice_y, *times)
        both = both.reshape(-1, 2, *both.shape[1:])
        return both[:, 0], both[:, 1]

    def guided(x, t, *until):
        strong, weak = strong_and_weak(x, t, *until)
        t = jnp.asarray(t, strong.dtype)
        weight = 1 + (scale - 1) * SCHEDULES[schedule](t)
        velocity = weak + weight * (strong - weak)
        if channels == "three":
            velocity = jnp.concatenate([velocity[..., :3], strong[..., 3:]], axis=-1)
        return velocity

    if scale == 1:
        return strong_alone
    if interval is None:
        return guided
    return lambda x, t, *until: jax.lax.cond(
        (t >= interval[0]) & (t <= interval[1]), guided, strong_alone, x, t, *until
    )


def _interleave(a: Array, b: Array) -> Array:
    """[2B,...]: a[0], b[0], a[1], b[1], ..."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def guided_at(t: float, *, scale: float, interval: tuple[float, float] | None = None) -> bool:
    """Whether `guided_velocity` evaluates the weak velocity too at time t."""
    return scale != 1 and (interval is None or bool(interval[0] <= t <= interval[1]))


def check_guidance(
    *, scale: float, channels: str, interval: tuple[float, float] | None, schedule: str
) -> None:
    """Raises ValueError for a name that is unknown, or a number or interval out of range."""
    if not (isinstance(scale, numbers.Real) and scale >= 0 and math.isfinite(scale)):
        raise ValueError(f"guidance is {scale!r}; expected a number of at least 0")
    if channels not in CHANNELS:
        raise ValueError(f"channels is {channels!r}; expected one of {', '.join(CHANNELS)}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    if interval is None:
        return
    try:
        low, high = interval
        in_order = 0 <= low <= high <= 1
    except (TypeError, ValueError) as error:  # not two, or no numbers
        raise ValueError(f"interval is {interval!r}; expected two times, (low, high)") from error
    if not in_order:
        raise ValueError(
            f"interval is {low} to {high}; expected low <= high, both in [0, 1] "
            "(t=0 is noise, t=1 is data)"
        )
