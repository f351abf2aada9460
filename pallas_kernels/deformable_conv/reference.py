"""The deformable aggregation as naive jnp: the definition of correct, for tests and documentation.

**What is computed.** For every image b, query token q = (x, y) and group g of C channels,

    out[b, q, g, :] = sum over k of a[b, q, g, k] * sample(v[b, :, :, g], q + offset[b, q, g, k])

Arrays are [B, h, w, G, ...]; h counts rows (y) and w columns (x), in tokens. The last axis of the
offsets is (dx, dy), in tokens. Token centres lie on the integers 0 ... w - 1 and 0 ... h - 1.

**Sampling** is separable: sample(v, (x, y)) = sum over i, j of  ty[j] * tx[i] * v[j, i], where the
row of weights tx over the columns i (as ty over the rows j) has at most two entries not zero:

    i0 = base(x),  tx[i0] = 1 - (x - i0),  tx[i0 + 1] = x - i0,

and an entry outside 0 ... w - 1 is dropped. The boundary modes differ in `base` alone:

- `"zeros"`: base = floor. Bilinear interpolation of the image padded with zeros: a sample fades to
  zero within one token of each border and is zero beyond.
- `"truncate"`: base = truncation toward zero, the `int(x)` of the CUDA and Triton kernels released
  with the paper, so that weights trained with them give what they gave there. Nothing changes for
  x >= 0. For -1 < x < 0 it extrapolates: column 0 weighs 1 - x (above one), column 1 weighs x
  (below zero). For -2 < x < -1 column 0 weighs x + 1 (below zero). For x <= -2, and at x = -1,
  nothing is left. So the result is smooth at x = 0, but jumps at -1 and at -2.

**Derivatives** hold `base` constant. At a kink they are therefore those of the piece to which
`base` assigns the coordinate: d tx[i0] / dx = -1, d tx[i0 + 1] / dx = +1, dropped outside as above.
That is so in both modes, gradients and derivatives along a direction. "zeros" is continuous, so
that differences of results are integrals of the latter; "truncate" jumps, which no derivative sees.

**Numbers that are not finite.** A sampling point with an infinite or NaN coordinate contributes
zero to its query, whatever its weight, and its offset and weight get zero gradients; how they move
adds nothing to a derivative along a direction. It changes nothing for any other point. Finite
coordinates of any size are handled: beyond the border they sample nothing. NaN or infinite
`values`, other `weights` and gradients of the output are *not* screened; an implementation may
spread them within their image and group, and no further.

**Dtypes.** Coordinates and sums are float32 whatever the inputs are (float64 here if an input is),
since in bfloat16 a coordinate of 31.4 has a step of 0.25. The result has the dtype of `values`,
each gradient that of its input.
"""

import jax
import jax.numpy as jnp

_BASES = {"zeros": jnp.floor, "truncate": jnp.trunc}


def deformable_aggregate_reference(
    values: jax.Array, offsets: jax.Array, weights: jax.Array, *, boundary: str = "zeros"
) -> jax.Array:
    """The operator as this module's docstring defines it; differentiable, and wasteful of memory.

    It holds arrays of [B, h, w, G, K, C], so keep it to small shapes.
    """
    b, h, w, g, _ = values.shape
    dtype = jnp.promote_types(jnp.result_type(values, offsets, weights), jnp.float32)
    x = offsets[..., 0].astype(dtype) + jnp.arange(w, dtype=dtype)[:, None, None]
    y = offsets[..., 1].astype(dtype) + jnp.arange(h, dtype=dtype)[:, None, None, None]
    finite = jnp.isfinite(x) & jnp.isfinite(y)
    x, y = jnp.where(finite, x, -2.0), jnp.where(finite, y, -2.0)  # -2 samples nothing
    x0, y0 = _BASES[boundary](x), _BASES[boundary](y)

    image = jnp.arange(b)[:, None, None, None, None]
    group = jnp.arange(g)[:, None]
    out = jnp.zeros((), dtype)
    for column, weight_x in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
        for row, weight_y in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            i = jnp.clip(column, 0, w - 1).astype(jnp.int32)
            j = jnp.clip(row, 0, h - 1).astype(jnp.int32)
            share = jnp.where(inside, weights.astype(dtype) * weight_x * weight_y, 0)
            out += jnp.sum(share[..., None] * values.astype(dtype)[image, j, i, group], axis=-2)
    return out.astype(values.dtype)
