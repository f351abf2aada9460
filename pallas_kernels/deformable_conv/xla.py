"""The deformable aggregation in plain JAX: any platform, any shape, no float scatter.

One group is worked on at a time, and of it a chunk of queries or tokens at a time, so that no array
of [B, h, w, G, K, C] and no [tokens, tokens] matrix of every group is ever held. What is here is
what measured best within that bound:

- Forward: for each sampling point and corner, gather a row of C channels and add it in. Linear in
  the number of tokens.
- Backward: let A[q, j] be the weight that query q gives to token j. Then out = A v, hence
  d values = A^T d out and dA = d out v^T: two matmuls, quadratic in the number of tokens. A is a
  sum of K products of interpolation weights, found by comparing coordinates with token numbers.
  The gradients of offsets and weights need 4 K entries of each row of dA, which are gathered. (A
  scatter-add would make d values linear in the tokens, but on GPUs it is atomic, so that its last
  bits differ from run to run.)

Temporary memory stays below twice the size of `values`, forward and backward, where G >= 2 and G C
is not tiny against K; a single group is its own chunk and takes up to five times.

No step mixes the batch axis with another, so one sharded over a mesh is never gathered. What is
computed, coordinates that are not finite included: `reference.py`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.deformable_conv.derivatives import Rules, differentiable
from pallas_kernels.deformable_conv.interpolation import BASES, are_finite
from pallas_kernels.deformable_conv.limits import product_dtype
from pallas_kernels.deformable_conv.points import Points, flatten_tokens


class _Corner(NamedTuple):
    """One of the four tokens around each sampling point; arrays are [B, queries, K]."""

    token: jax.Array  # int32, y * w + x; 0 where outside
    inside: jax.Array  # bool
    weight_x: jax.Array  # float32; 0 where outside
    weight_y: jax.Array
    slope_x: int  # d weight_x / dx, -1 or +1
    slope_y: int


def deformable_aggregate_xla(values: jax.Array, points: Points, boundary: str) -> jax.Array:
    """`api.deformable_aggregate` without its checks."""
    return _by_offsets(boundary)(values, *points.to_offsets())


@functools.cache
def _by_offsets(boundary: str) -> Callable:
    """The operator of (values, offsets, weights)."""

    def backward(inputs, d_out):
        return _gradients(*inputs, d_out, boundary)

    rules = Rules(
        forward=functools.partial(_aggregate, boundary=boundary),
        backward=backward,
        tangent=functools.partial(_tangent, boundary=boundary),
        inputs=("b h w g c", "b h w g k t", "b h w g k"),
        moving=3,
    )
    return differentiable(rules)


@functools.partial(jax.jit, static_argnames="boundary")
def _aggregate(values, offsets, weights, boundary: str) -> jax.Array:
    shape = values.shape
    _, h, w, groups, channels = shape
    points = weights.shape[-1]
    values, offsets, weights = map(flatten_tokens, (values, offsets, weights))
    size = _tokens_per_step(values, w, _point_floats(weights) + 2 * channels)

    def group_step(group, out):
        image = _slice_group(values, group)

        def chunk_step(i, out):
            offset, share = (_chunk(array, group, i * size, size) for array in (offsets, weights))
            x, y, share = _located(offset, share, i * size, w)
            total = jnp.zeros((), jnp.float32)
            for corner in _corners(x, y, h, w, boundary):
                factor = share * corner.weight_x * corner.weight_y
                for k in range(points):
                    rows = _gather(image, corner.token[..., k, None], axis=1)
                    total += factor[..., k, None] * rows.astype(jnp.float32)
            return _update(out, total, group, i * size)

        return lax.fori_loop(0, h * w // size, chunk_step, out)

    return lax.fori_loop(0, groups, group_step, jnp.zeros_like(values)).reshape(shape)


@functools.partial(jax.jit, static_argnames="boundary")
def _tangent(values, offsets, weights, d_values, d_offsets, d_weights, boundary: str) -> jax.Array:
    """The derivative of `_aggregate` along the last three: rows of both kinds of values."""
    shape = values.shape
    _, h, w, groups, channels = shape
    arrays = values, offsets, weights, d_values, d_offsets, d_weights
    values, offsets, weights, d_values, d_offsets, d_weights = map(flatten_tokens, arrays)
    size = _tokens_per_step(values, w, 2 * _point_floats(weights) + 3 * channels)

    def group_step(group, out):
        image, d_image = (_slice_group(array, group) for array in (values, d_values))

        def chunk_step(i, out):
            offset, share, d_offset, d_share = (
                _chunk(array, group, i * size, size)
                for array in (offsets, weights, d_offsets, d_weights)
            )
            finite = are_finite(*_coordinates(offset, i * size, w))
            x, y, share = _located(offset, share, i * size, w)
            d_x, d_y, d_share = (
                jnp.where(finite, d.astype(jnp.float32), 0)
                for d in (d_offset[..., 0], d_offset[..., 1], d_share)
            )
            corners = []
            for corner in _corners(x, y, h, w, boundary):
                weight = corner.weight_x * corner.weight_y
                slope = d_x * corner.slope_x * corner.weight_y
                slope += d_y * corner.slope_y * corner.weight_x
                corners.append((corner.token, share * weight, d_share * weight + share * slope))

            def add_point(total, corners):
                for token, factor, d_factor in corners:
                    for by, rows in ((d_factor, image), (factor, d_image)):
                        found = _gather(rows, token[..., None], axis=1).astype(jnp.float32)
                        total += by[..., None] * found
                return total, None

            # A loop, for it compiles in a quarter of the time.
            points_first = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), corners)
            total = jnp.zeros_like(values, jnp.float32, shape=(*x.shape[:2], channels))
            total, _ = lax.scan(add_point, total, points_first)
            return _update(out, total, group, i * size)

        return lax.fori_loop(0, h * w // size, chunk_step, out)

    return lax.fori_loop(0, groups, group_step, jnp.zeros_like(values)).reshape(shape)


@functools.partial(jax.jit, static_argnames="boundary")
def _gradients(values, offsets, weights, d_out, boundary: str) -> tuple[jax.Array, ...]:
    _, h, w, _, _ = values.shape
    shapes = [array.shape for array in (values, offsets, weights)]
    values, offsets, weights, d_out = map(flatten_tokens, (values, offsets, weights, d_out))
    d_values = _values_gradient(offsets, weights, d_out, w, boundary)
    d_points = _point_gradients(values, offsets, weights, d_out, h, w, boundary)
    return tuple(g.reshape(s) for g, s in zip((d_values, *d_points), shapes, strict=True))


def _values_gradient(offsets, weights, d_out, w: int, boundary: str) -> jax.Array:
    """d values[j] = sum over q of A[q, j] d out[q], for a chunk of tokens j at a time."""
    b, tokens, groups, channels = d_out.shape
    dtype = product_dtype(d_out.dtype, weights.dtype)
    query_size = _tokens_per_step(d_out, w, _point_floats(weights) + channels)
    token_size = _tokens_per_step(d_out, w, query_size + 2 * channels)

    def token_step(i, d_values, group):
        def query_step(j, total):
            offset, share, d_rows = (
                _chunk(array, group, j * query_size, query_size)
                for array in (offsets, weights, d_out)
            )
            x, y, share = _located(offset, share, j * query_size, w)
            matrix = _interpolation_matrix(x, y, share, i * token_size, token_size, w, boundary)
            return total + _matmul("bqn,bqc->bnc", matrix.astype(dtype), d_rows.astype(dtype))

        init = jnp.zeros_like(d_out, jnp.float32, shape=(b, token_size, channels))
        total = lax.fori_loop(0, tokens // query_size, query_step, init)
        return _update(d_values, total, group, i * token_size)

    def group_step(group, d_values):
        step = functools.partial(token_step, group=group)
        return lax.fori_loop(0, tokens // token_size, step, d_values)

    return lax.fori_loop(0, groups, group_step, jnp.zeros_like(d_out))


def _point_gradients(values, offsets, weights, d_out, h: int, w: int, boundary: str):
    """Gradients of offsets and weights, from dA[q, j] = d out[q] . v[j] of a chunk of queries q."""
    tokens, groups = d_out.shape[1:3]
    size = _tokens_per_step(d_out, w, tokens + _point_floats(weights))

    def group_step(group, gradients):
        image = _slice_group(values, group)

        def chunk_step(i, gradients):
            offset, share, d_rows = (
                _chunk(array, group, i * size, size) for array in (offsets, weights, d_out)
            )
            x, y, share = _located(offset, share, i * size, w)
            d_matrix = _matmul("bqc,bnc->bqn", d_rows, image)
            d_offset, d_share = _gradients_from_matrix(d_matrix, x, y, share, h, w, boundary)
            d_offsets, d_weights = gradients
            d_offsets = _update(d_offsets, d_offset, group, i * size)
            return d_offsets, _update(d_weights, d_share, group, i * size)

        return lax.fori_loop(0, tokens // size, chunk_step, gradients)

    init = jnp.zeros_like(offsets), jnp.zeros_like(weights)
    return lax.fori_loop(0, groups, group_step, init)


def _tokens_per_step(values: jax.Array, w: int, floats_per_token: int) -> int:
    """How many tokens (or queries) of one group a step works on, for the whole batch at once.

    Whole rows or a part of one, as many in each step, and no more than keep what a step holds
    within the size of `values` [B, tokens, G, C].
    """
    _, tokens, groups, channels = values.shape
    budget = tokens * groups * channels * values.dtype.itemsize // (4 * floats_per_token)
    rows_or_parts = [w * n for n in _divisors(tokens // w)] + _divisors(w)
    return max(n for n in rows_or_parts if n <= max(budget, 1))


def _point_floats(weights: jax.Array) -> int:
    """Floats a query that a step holds of coordinates, corners and their weights, as measured."""
    return 16 * weights.shape[-1]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _coordinates(offsets: jax.Array, start: jax.Array, w: int) -> tuple[jax.Array, jax.Array]:
    """x and y [B, queries, K] in float32, of the queries from `start` on, row by row."""
    query = start + jnp.arange(offsets.shape[1])[:, None]
    x = offsets[..., 0].astype(jnp.float32) + (query % w).astype(jnp.float32)
    y = offsets[..., 1].astype(jnp.float32) + (query // w).astype(jnp.float32)
    return x, y


def _located(offsets: jax.Array, weights: jax.Array, start: jax.Array, w: int) -> tuple:
    """x, y and weights [B, queries, K] in float32, of the queries from `start` on, row by row.

    A point whose coordinates are not finite has no weight.
    """
    x, y = _coordinates(offsets, start, w)
    return x, y, jnp.where(are_finite(x, y), weights.astype(jnp.float32), 0)


def _corners(x: jax.Array, y: jax.Array, h: int, w: int, boundary: str) -> Iterator[_Corner]:
    x0, y0 = BASES[boundary](x), BASES[boundary](y)
    for row, weight_y, slope_y in ((y0, 1 - (y - y0), -1), (y0 + 1, y - y0, 1)):
        for column, weight_x, slope_x in ((x0, 1 - (x - x0), -1), (x0 + 1, x - x0, 1)):
            # False for NaN and infinity too, which hence sample nothing.
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            # In integers: float32 counts tokens up to 2^24.
            j, i = (jnp.where(inside, z, 0).astype(jnp.int32) for z in (row, column))
            yield _Corner(
                token=j * w + i,
                inside=inside,
                weight_x=jnp.where(inside, weight_x, 0),
                weight_y=jnp.where(inside, weight_y, 0),
                slope_x=slope_x,
                slope_y=slope_y,
            )


def _interpolation_matrix(x, y, share, start, size: int, w: int, boundary: str) -> jax.Array:
    """A [B, queries, size] in float32, of the `size` tokens from `start` on.

    They are whole rows or a part of one; x, y and share (the weights) are [B, queries, K].
    """
    first_row, rows = start // w, max(size // w, 1)
    first_column, columns = start % w, min(size, w)
    total = jnp.zeros((), jnp.float32)
    for k in range(x.shape[-1]):
        over_rows = _interpolation_weights(y[..., k], first_row, rows, boundary)
        over_columns = _interpolation_weights(x[..., k], first_column, columns, boundary)
        over_rows *= share[..., k, None]
        total += over_rows[..., :, None] * over_columns[..., None, :]
    return total.reshape(*total.shape[:-2], size)


def _interpolation_weights(coordinate, first, count: int, boundary: str) -> jax.Array:
    """The weights [..., count] of the tokens from `first` on along one axis: at most two not 0."""
    base = BASES[boundary](coordinate)
    beyond = (coordinate - base)[..., None]
    # Shifting `base`, not the tokens, leaves a plain iota: XLA's CPU code is 5 times faster for it.
    distance = jnp.arange(count, dtype=jnp.float32) - (base - first)[..., None]
    return jnp.where(distance == 0, 1 - beyond, jnp.where(distance == 1, beyond, 0))


def _gradients_from_matrix(d_matrix, x, y, share, h: int, w: int, boundary: str):
    """Gradients of offsets [B, queries, K, 2] and weights [B, queries, K] from that of A."""
    d_x = d_y = d_share = jnp.zeros((), jnp.float32)
    for corner in _corners(x, y, h, w, boundary):
        d_entry = jnp.where(corner.inside, _gather(d_matrix, corner.token, axis=2), 0)
        d_share += d_entry * corner.weight_x * corner.weight_y
        d_x += corner.slope_x * d_entry * corner.weight_y
        d_y += corner.slope_y * d_entry * corner.weight_x
    return jnp.stack([share * d_x, share * d_y], axis=-1), d_share


def _matmul(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    # HIGHEST, or GPUs and TPUs round float32 operands to fewer bits.
    return jnp.einsum(
        equation, left, right, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _gather(array: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """`array` [B, ...] along `axis`; [B, queries, 1] indices of axis 1 take whole rows."""
    return jnp.take_along_axis(array, index, axis=axis, mode="promise_in_bounds")


# The two below tie the array to the loops' indices by a barrier. Without it XLA's CPU backend,
# which slices 16-bit floats in float32, keeps a float32 copy of the whole array.


def _slice_group(array: jax.Array, group: jax.Array) -> jax.Array:
    """[B, tokens, G, ...] -> [B, tokens, ...]."""
    array, group = lax.optimization_barrier((array, group))
    return lax.dynamic_index_in_dim(array, group, axis=2, keepdims=False)


def _chunk(array: jax.Array, group: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """[B, tokens, G, ...] -> [B, size, ...]."""
    array, group, start = lax.optimization_barrier((array, group, start))
    sizes = (array.shape[0], size, 1, *array.shape[3:])
    return lax.dynamic_slice(array, _indices(array, group, start), sizes)[:, :, 0]


def _update(array: jax.Array, chunk: jax.Array, group: jax.Array, start: jax.Array) -> jax.Array:
    """`array` [B, tokens, G, ...] with [:, start : start + size, group] replaced by `chunk`."""
    update = _bits(chunk[:, :, None].astype(array.dtype))
    out = lax.dynamic_update_slice(_bits(array), update, _indices(array, group, start))
    return lax.bitcast_convert_type(out, array.dtype)


def _indices(array: jax.Array, group: jax.Array, start: jax.Array) -> tuple:
    return (0, start, group, *(0,) * (array.ndim - 3))


def _bits(array: jax.Array) -> jax.Array:
    # XLA's CPU backend updates 16-bit floats in float32, widening the whole array each time.
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype.itemsize == 2 else array
