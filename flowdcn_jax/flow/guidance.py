"""Classifier-free guidance."""

import jax.numpy as jnp


def guided_velocity(velocity_fn, *, null_class: int, scale: float):
    """velocity_fn with classifier-free guidance: u + scale * (c - u) on every channel.

    c is the velocity for the class asked for, u the one for `null_class`; both come from one
    evaluation of twice the batch. scale=1 is no guidance and costs a single evaluation.

    Args:
        velocity_fn: (x [B,...], t [B], y [B]) -> velocity [B,...].
        null_class: the label that stands for "no class".
        scale: guidance weight w (published FIDs use 1.375).

    Returns:
        A function of the same signature.
    """
    if scale == 1.0:
        return velocity_fn

    def guided(x, t, y):
        twice_y = jnp.concatenate([y, jnp.full_like(y, null_class)])
        both = velocity_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), twice_y)
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + scale * (conditional - unconditional)

    return guided
