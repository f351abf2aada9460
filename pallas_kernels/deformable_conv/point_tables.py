"""Sampling points as `row_slices.py` reads them, for NVIDIA's Hopper.

Several blocks want the same points there. So they are evaluated once, and written to memory as
tables of eight queries. Points go two by two. Of such a pair, a table has a word for each query,
with the two numbers that say where the first of four tokens is; and, after these words of all
pairs, four words for each query: the two weights of each token, in the values' dtype.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv.group import Group, num_tiles
from pallas_kernels.deformable_conv.image import image_of
from pallas_kernels.deformable_conv.inner_corners import (
    corners_of_points,
    moving_corners_of_points,
)
from pallas_kernels.deformable_conv.launch import launch
from pallas_kernels.deformable_conv.point_rows import QUERIES, exchange_bytes
from pallas_kernels.deformable_conv.points import Points, PointsTangent
from pallas_kernels.deformable_conv.warp import Warp

EIGHT = 8  # queries of a table
CODES = EIGHT  # words of a pair
WEIGHTS = 4 * EIGHT
NUM_WARPS = 8


def num_tables(tokens: int) -> int:
    return -(-tokens // EIGHT)


def num_pairs(num_points: int) -> int:
    return -(-num_points // 2)


def num_words(num_points: int) -> int:
    """Of a table."""
    return num_pairs(num_points) * (CODES + WEIGHTS)


def tables(
    values,
    points,
    *,
    h: int,
    w: int,
    row: int,
    step: int,
    boundary: str,
    interpret: bool,
    tangent: PointsTangent | None = None,
) -> list[jax.Array]:
    """Arrays [B, G, tables, words] int32. The number of token (x, y) is x step + y row, below 2^16.

    One, or with a `tangent` of the points two: in the second, the weights are their tangents.
    """
    image = image_of(values, points, h, w, boundary)
    batch = values.shape[0]
    parts = -(-num_tiles(image) // NUM_WARPS)
    shape = batch, image.groups, num_tables(image.tokens), num_words(image.num_points)
    kernel = _kernel if tangent is None else _tangent_kernel
    exchanged = max(exchange_bytes(x) for x in (points, tangent) if x is not None)
    return launch(
        functools.partial(kernel, image=image, parts=parts, row=row, step=step),
        name="deformable_point_tables" if tangent is None else "deformable_tangent_point_tables",
        num_blocks=batch * image.groups * parts,
        shared_bytes=NUM_WARPS * exchanged,
        points=points,
        tangent=tangent,
        inputs=(),
        outputs=(jax.ShapeDtypeStruct(shape, jnp.int32),) * (1 if tangent is None else 2),
        num_warps=NUM_WARPS,
        interpret=interpret,
    )


def _kernel(warp: Warp, points: Points, shared, out, *, image, parts: int, row: int, step: int):
    group = Group(warp, image, warp.block // parts, points)
    tile = (warp.block % parts) * warp.num_warps + warp.warp
    scratch = shared + warp.warp * group.points.bytes

    def visit(_):
        words = group.points.exchange(group.points.load(tile), scratch)
        corners = corners_of_points(group, words, group.queries(tile))
        _store(group, out, tile, corners, [x.weights for x in corners], row, step)

    warp.when(tile < num_tiles(image), visit)


def _tangent_kernel(
    warp: Warp,
    points: tuple[Points, PointsTangent],
    shared,
    out,
    d_out,
    *,
    image,
    parts: int,
    row: int,
    step: int,
):
    points, tangent = points
    group = Group(warp, image, warp.block // parts, points)
    along = group.rows_of(tangent)
    tile = (warp.block % parts) * warp.num_warps + warp.warp
    scratch = shared + warp.warp * max(group.points.bytes, along.bytes)

    def visit(_):
        loaded, d_loaded = group.points.load(tile), along.load(tile)
        words = group.points.exchange(loaded, scratch)
        d_words = along.exchange(d_loaded, scratch)
        found = moving_corners_of_points(group, words, along, d_words, group.queries(tile))
        corners, d_weights = zip(*found, strict=True)
        _store(group, out, tile, corners, [x.weights for x in corners], row, step)
        _store(group, d_out, tile, corners, d_weights, row, step)

    warp.when(tile < num_tiles(image), visit)


def _store(group: Group, out, tile, corners, weights, row: int, step: int) -> None:
    """Writes the table of the lane's query, with these weights of each point's four corners."""
    warp, image = group.warp, group.image
    tables = num_tables(image.tokens)
    table, query = tile * (QUERIES // EIGHT) + (warp.lane >> 3), warp.lane & (EIGHT - 1)
    mask = table < tables if tables % (QUERIES // EIGHT) else None
    first = (group.number * tables + table) * num_words(image.num_points)
    codes_at = first + query
    weights_at = first + query * 4 + num_pairs(image.num_points) * CODES
    for n in range(num_pairs(image.num_points)):
        pair, two = corners[2 * n : 2 * n + 2], weights[2 * n : 2 * n + 2]
        a, b = pair[0], pair[-1]  # the last point of an odd number takes both places
        code = (a.y * row + a.x * step) | ((b.y * row + b.x * step) << 16)
        warp.store_words(out, codes_at + n * CODES, [code], mask=mask)
        packed = [warp.pack(*x, image.dtype) for x in zip(two[0], two[-1], strict=True)]
        warp.store_words(out, weights_at + n * WEIGHTS, packed, mask=mask)
