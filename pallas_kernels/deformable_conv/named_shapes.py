"""The shapes that the project measures and promises speed for, and inputs of any shape."""

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv.points import Multiscale

# B, h, w, G, C, K.
NAMED_SHAPES = {
    "XL at 256": (64, 16, 16, 16, 72, 9),
    "XL at 512": (32, 32, 32, 16, 72, 9),
    "XL at 1024": (16, 64, 64, 16, 72, 9),
    "B at 256": (64, 16, 16, 12, 64, 9),
}
MAX_SCALE = 6.0  # tokens


def model_inputs(shape, dtype="float32", *, widening: float = 1.0, seed: int = 0):
    """(values, points, d_out) of shape (B, h, w, G, C, K) and offsets as training starts with.

    Group g's radius is (g+1)/G of 6 tokens, times `widening`.
    """
    b, h, w, g, c, k = shape
    side = jnp.linspace(-1, 1, max(round(k**0.5), 1)) if k > 1 else jnp.zeros(1)
    prior = jnp.resize(jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2), (k, 2))
    fraction = (jnp.arange(g) + 1) / g - 1e-4
    keys = jax.random.split(jax.random.key(seed), 5)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape).astype(dtype)  # noqa: E731
    points = Multiscale(
        directions=(0.3 * normal(0, b, h, w, g, k, 2)).astype(dtype),
        scales=(0.3 * normal(1, b, h, w, g, k)).astype(dtype),
        weights=normal(2, b, h, w, g, k),
        scale_prior=jnp.log(fraction / (1 - fraction)),
        direction_prior=prior,
        max_scale=jnp.full((2,), widening * MAX_SCALE, jnp.float32),
    )
    return normal(3, b, h, w, g, c), points, normal(4, b, h, w, g, c)
