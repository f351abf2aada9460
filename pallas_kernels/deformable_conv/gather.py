"""A forward that gathers: four rows of C channels for each sampling point of each query.

And its derivative along a direction, which gathers rows of the values' tangent as well.

Its work is linear in the number of tokens, whatever the offsets. A few threads have a query to
themselves, each with the channels that one load instruction fetches: more threads a query compute
its coordinates more often, fewer touch more cache lines with each load. Nothing is shared, so there
is no scatter, and every run gives the same bits.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import triton as backend
from pallas_kernels.deformable_conv.blocks import LOAD_BYTES
from pallas_kernels.deformable_conv.grid import Grid
from pallas_kernels.deformable_conv.interpolation import corners, parts_of_tangent
from pallas_kernels.deformable_conv.tiles import load_rows, tile_of


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


def tangent(
    values,
    points,
    d_values,
    d_points,
    *,
    grid: Grid,
    chunk: int,
    boundary: str,
    num_warps: int,
    interpret: bool,
):
    """The tangent of `forward`'s result, where values and points move by d_values and d_points."""
    (out,) = backend.launch(
        functools.partial(_tangent_kernel, grid=grid, chunk=chunk, boundary=boundary),
        name="deformable_tangent_gather",
        tiles=grid.tiles,
        points=points,
        tangent=d_points,
        inputs=(values, d_values),
        outputs=(jax.ShapeDtypeStruct(values.shape, values.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return out


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
    tile = tile_of(grid, backend.tile_number())
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
                    row = backend.to_float32(load_rows(values, token, first, size))
                    totals[n] = backend.fma(factor, row, totals[n])
        return tuple(totals)

    zeros = tuple(jnp.zeros((grid.tile_size, size), jnp.float32) for _, size in blocks)
    totals = jax.lax.fori_loop(0, points.weights.shape[-1], add_point, zeros)
    for (first, _), total in zip(blocks, totals, strict=True):
        tile.write_channels(out, first, total)


def _tangent_kernel(points, d_points, values, d_values, out, *, grid, chunk: int, boundary: str):
    tile = tile_of(grid, backend.tile_number())
    blocks = _channel_blocks(values.shape[-1], chunk, LOAD_BYTES // values.dtype.itemsize)

    def add_point(k, totals):
        x, y, point = tile.point(points, k)
        moved = tile.tangent(point, d_points, k)
        columns, rows = corners(x, grid.w, boundary), corners(y, grid.h, boundary)
        totals = list(totals)
        for j in range(2):
            share = rows.weight[j] * point.weight
            parts = parts_of_tangent(point.weight, moved, rows.weight[j], rows.slope[j])
            for i in range(2):
                token = rows.index[j] * grid.w + columns.index[i]
                factor = (share * columns.weight[i])[:, None]
                d_factor = parts[0] * columns.weight[i] + parts[1] * columns.slope[i]
                for n, (first, size) in enumerate(blocks):
                    for by, ref in ((d_factor[:, None], values), (factor, d_values)):
                        row = backend.to_float32(load_rows(ref, token, first, size))
                        totals[n] = backend.fma(by, row, totals[n])
        return tuple(totals)

    zeros = tuple(jnp.zeros((grid.tile_size, size), jnp.float32) for _, size in blocks)
    totals = jax.lax.fori_loop(0, points.weights.shape[-1], add_point, zeros)
    for (first, _), total in zip(blocks, totals, strict=True):
        tile.write_channels(out, first, total)
