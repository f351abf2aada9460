"""Kernels that gather: four rows of C channels for each sampling point of each query.

Their work is linear in the number of tokens, whatever the offsets. One thread has a query to
itself: it computes a point's coordinates and weights once and then walks over the channels, as many
at a time as one load instruction fetches. Nothing is shared, so there is no scatter, and every run
gives the same bits.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import triton as backend
from pallas_kernels.deformable_conv.blocks import LOAD_BYTES
from pallas_kernels.deformable_conv.interpolation import corners
from pallas_kernels.deformable_conv.tiles import Grid, load_rows


def forward(
    values, points, *, grid: Grid, chunk: int, boundary: str, num_warps: int, interpret: bool
):
    """out [B, tokens, G, C] of values [B, tokens, G, C] and points with flattened tokens."""
    (out,) = backend.launch(
        functools.partial(_forward_kernel, grid=grid, chunk=chunk, boundary=boundary),
        name="deformable_forward_gather",
        tiles=grid.tiles,
        points=points,
        inputs=(values,),
        outputs=(jax.ShapeDtypeStruct(values.shape, values.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return out


def point_gradients(
    values,
    points,
    d_out,
    *,
    grid: Grid,
    chunk: int,
    boundary: str,
    num_warps: int,
    interpret: bool,
) -> list[jax.Array]:
    """The gradients of points.per_query, in their dtypes."""
    return backend.launch(
        functools.partial(_point_gradients_kernel, grid=grid, chunk=chunk, boundary=boundary),
        name="deformable_point_gradients",
        tiles=grid.tiles,
        points=points,
        inputs=(values, d_out),
        outputs=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in points.per_query),
        num_warps=num_warps,
        interpret=interpret,
    )


def _channel_blocks(channels: int, chunk: int, least: int) -> list[tuple[int, int]]:
    """(first, size) of blocks of `chunk` channels, the last one smaller where that covers it."""
    blocks, first = [], 0
    while first < channels:
        while chunk > least and chunk >= 2 * (channels - first):
            chunk //= 2
        blocks.append((first, chunk))
        first += chunk
    return blocks


def _forward_kernel(points, values, out, *, grid: Grid, chunk: int, boundary: str):
    tile = grid.tile(backend.tile_number())
    blocks = _channel_blocks(values.shape[-1], chunk, LOAD_BYTES // values.dtype.itemsize)

    def add_point(k, totals):
        x, y, point = tile.point(points, k)
        columns, rows = corners(x, grid.w, boundary), corners(y, grid.h, boundary)
        totals = list(totals)
        for j in range(2):
            share = rows.weight[j] * point.weight
            for i in range(2):
                token = rows.index[j] * grid.w + columns.index[i]
                factor = (share * columns.weight[i])[:, None]
                for n, (first, size) in enumerate(blocks):
                    totals[n] += factor * backend.to_float32(load_rows(values, token, first, size))
        return tuple(totals)

    zeros = tuple(jnp.zeros((grid.tile_size, size), jnp.float32) for _, size in blocks)
    totals = jax.lax.fori_loop(0, points.weights.shape[-1], add_point, zeros)
    for (first, _), total in zip(blocks, totals, strict=True):
        tile.write_channels(out, first, total)


def _point_gradients_kernel(
    points, values, d_out, *gradients, grid: Grid, chunk: int, boundary: str
):
    tile = grid.tile(backend.tile_number())
    blocks = _channel_blocks(values.shape[-1], chunk, LOAD_BYTES // values.dtype.itemsize)

    def one_point(k, carry):
        x, y, point = tile.point(points, k)
        columns, rows = corners(x, grid.w, boundary), corners(y, grid.h, boundary)
        # d out . v of each corner; sums over the channels of a block are left for the end.
        products = {(j, i): {} for j in range(2) for i in range(2)}
        for first, size in blocks:
            d_row = backend.to_float32(tile.read_channels(d_out, first, size))
            for (j, i), sums in products.items():
                token = rows.index[j] * grid.w + columns.index[i]
                row = backend.to_float32(load_rows(values, token, first, size))
                sums[size] = sums.get(size, 0.0) + d_row * row
        d_dx = d_dy = d_weight = jnp.zeros((grid.tile_size,), jnp.float32)
        for (j, i), sums in products.items():
            product = sum(jnp.sum(x, axis=1) for x in sums.values())
            d_weight += rows.weight[j] * columns.weight[i] * product
            d_dx += rows.weight[j] * columns.slope[i] * product
            d_dy += rows.slope[j] * columns.weight[i] * product
        pulled = point.pull_back(point.weight * d_dx, point.weight * d_dy, d_weight)
        for ref, gradient in zip(gradients, pulled, strict=True):
            if isinstance(gradient, tuple):
                tile.write(ref, k, 0, value=gradient[0])
                tile.write(ref, k, 1, value=gradient[1])
            else:
                tile.write(ref, k, value=gradient)
        return carry

    jax.lax.fori_loop(0, points.weights.shape[-1], one_point, 0)
