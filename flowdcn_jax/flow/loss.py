"""The flow-matching loss and the random draws that it needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from flowdcn_jax.flow import path


class Draws(NamedTuple):
    """One step's randomness, an entry a row of the global batch."""

    t: Array  # [B] float32 in (0,1)
    noise: Array  # [B,H,W,C] float32
    drop_label: Array  # [B] bool


def draw(key: Array, shape: tuple[int, ...], *, time_distribution: str, label_dropout: float):
    """Draws times, noise and dropped labels for data of `shape` [B,H,W,C]."""
    time_key, noise_key, dropout_key = jax.random.split(key, 3)
    return Draws(
        t=path.TIME_DISTRIBUTIONS[time_distribution](time_key, shape[:1]),
        noise=jax.random.normal(noise_key, shape, jnp.float32),
        drop_label=jax.random.bernoulli(dropout_key, label_dropout, shape[:1]),
    )


def velocity_loss(
    params, data: Array, label: Array, draws: Draws, *, velocity_fn, null_class: int
) -> Array:
    """Mean squared error of the velocity over batch, space and channels (a float32 scalar).

    Args:
        params: what is differentiated; `velocity_fn` takes it.
        data: x at t=1, [B,H,W,C] float32.
        label: [B] integers.
        draws: see `draw`.
        velocity_fn: (params, x_t [B,H,W,C], t [B], y [B]) -> velocity [B,H,W,C].
        null_class: the label that stands for "no class".
    """
    y = jnp.where(draws.drop_label, null_class, label)
    x_t = path.interpolate(draws.noise, data, draws.t)
    error = velocity_fn(params, x_t, draws.t, y) - path.target_velocity(draws.noise, data)
    return jnp.mean(jnp.square(error.astype(jnp.float32)))
