"""The arithmetic of bilinear sampling along one axis, free of any backend.

`reference.py` defines what is computed; here are the two forms in which the kernels use it. With
base = floor or trunc of a coordinate x, and f = x - base, an image's axis of `size` tokens has at
most two weights that are not zero: 1 - f at `base` and f at `base + 1`, where these lie inside.

- `corners`: those two tokens and their weights, for kernels that gather.
- `axis_weights`: the weights of given tokens, most of them zero, for kernels that multiply by the
  interpolation matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

BASES = {"zeros": jnp.floor, "truncate": jnp.trunc}
NOWHERE = -4.0  # a coordinate that samples nothing, whatever the boundary


class Corners(NamedTuple):
    """The two tokens around each coordinate along one axis; arrays shaped like the coordinate."""

    token: tuple[jax.Array, jax.Array]  # int32
    index: tuple[jax.Array, jax.Array]  # the token, moved inside where it lay outside
    weight: tuple[jax.Array, jax.Array]  # float32; 0 where outside
    slope: tuple[jax.Array, jax.Array]  # d weight / d coordinate: -1, +1; 0 where outside


def are_finite(x: jax.Array, y: jax.Array) -> jax.Array:
    """Whether neither coordinate is NaN or infinite."""
    return (jnp.abs(x) < jnp.inf) & (jnp.abs(y) < jnp.inf)


def discard_non_finite(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The coordinates, moved to where nothing is sampled if either is NaN or infinite."""
    finite = are_finite(x, y)
    return jnp.where(finite, x, NOWHERE), jnp.where(finite, y, NOWHERE)


def corners(x: jax.Array, size: int, boundary: str) -> Corners:
    """The corners along an axis of `size` tokens of finite coordinates `x`."""
    base = BASES[boundary](x)
    fraction = x - base
    first = jnp.clip(base, -2.0, float(size)).astype(jnp.int32)
    tokens = first, first + 1
    indices, weights, slopes = [], [], []
    for token, weight, slope in zip(tokens, (1 - fraction, fraction), (-1.0, 1.0), strict=True):
        inside = (token >= 0) & (token < size)
        indices.append(jnp.clip(token, 0, size - 1))
        weights.append(jnp.where(inside, weight, 0.0))
        slopes.append(jnp.where(inside, slope, 0.0))
    return Corners(tokens, tuple(indices), tuple(weights), tuple(slopes))


def parts_of_tangent(weight, moved: tuple, row_weight, row_slope) -> tuple:
    """How the weights of a point's corners in one row of the image move with the point.

    (at_weight, at_slope): the tangent of what the token in a column weighs is at_weight times the
    column's weight, and at_slope times its slope. `moved` is (d x, d y, d weight) of the point.
    """
    d_x, d_y, d_weight = moved
    at_weight = d_weight * row_weight + weight * (d_y * row_slope)
    return at_weight, weight * row_weight * d_x


def axis_weights(x: jax.Array, token: jax.Array, boundary: str, tent: Callable) -> jax.Array:
    """The weight of each `token` (float32, inside the image) for the finite coordinates `x`.

    tent(d) is max(0, 1 - |d|).
    """
    if boundary == "zeros":
        return tent(x - token)
    base = BASES[boundary](x)
    distance = token - base
    fraction = x - base
    return jnp.where(distance == 0, 1 - fraction, jnp.where(distance == 1, fraction, 0.0))


def split_bfloat16(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is the float32 `x`: 8 of its 24 bits each, cut off.

    Rounding instead would need GPUs' conversion instruction, of which they do few at a time.
    """
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        upper_half = jax.lax.shift_right_logical(bits, jnp.full_like(bits, 16)).astype(jnp.int16)
        parts.append(jax.lax.bitcast_convert_type(upper_half, jnp.bfloat16))
        x = x - jax.lax.bitcast_convert_type(bits & -65536, jnp.float32)
    return parts
