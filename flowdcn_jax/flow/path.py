"""The linear path between noise and data, and the times at which it is trained."""

import jax
import jax.numpy as jnp
from jax import Array


def interpolate(noise: Array, data: Array, t: Array) -> Array:
    """x_t = t * data + (1 - t) * noise; noise and data [B,...], t [B]."""
    t = t.reshape(t.shape + (1,) * (data.ndim - 1))
    return t * data + (1 - t) * noise


def target_velocity(noise: Array, data: Array) -> Array:
    """d x_t / dt = data - noise, the same at every t."""
    return data - noise


def uniform_times(key: Array, shape: tuple[int, ...]) -> Array:
    """t ~ U(0,1)."""
    return jax.random.uniform(key, shape, jnp.float32)


def logit_normal_times(key: Array, shape: tuple[int, ...]) -> Array:
    """t = sigmoid(N(0,1)): more training in the middle of the path."""
    return jax.nn.sigmoid(jax.random.normal(key, shape, jnp.float32))


TIME_DISTRIBUTIONS = {"uniform": uniform_times, "logit_normal": logit_normal_times}
