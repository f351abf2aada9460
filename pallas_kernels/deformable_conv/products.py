"""The gradients of the sampling points from products of whole rows, on tensor cores.

dA[q, j] = d out[q] . v[j], for a tile of queries and a tile of tokens, is one matrix product. Each
sampling point needs four of its entries, which are looked up in shared memory: bytes are read from
there, not rows of C channels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import triton as backend
from pallas_kernels.deformable_conv.grid import Grid
from pallas_kernels.deformable_conv.interpolation import Corners, corners, split_bfloat16
from pallas_kernels.deformable_conv.tiles import channel_blocks, tile_of


def point_gradients(
    values,
    points,
    d_out,
    *,
    queries: Grid,
    tokens: Grid,
    dtypes: tuple,
    boundary: str,
    num_warps: int,
    interpret: bool,
) -> list[jax.Array]:
    """The gradients of points.per_query, in `dtypes`.

    values and d_out are [B, tokens, G, C], points have their tokens flattened; `queries` and
    `tokens` cut the same image into the tiles of the two sides of dA.
    """
    return backend.launch(
        functools.partial(
            _point_gradients_kernel, queries=queries, tokens=tokens, boundary=boundary
        ),
        name="deformable_point_gradients",
        tiles=queries.tiles,
        points=points,
        inputs=(values, d_out),
        outputs=tuple(
            jax.ShapeDtypeStruct(x.shape, dtype)
            for x, dtype in zip(points.per_query, dtypes, strict=True)
        ),
        num_warps=num_warps,
        interpret=interpret,
    )


def _point_gradients_kernel(
    points, values, d_out, *gradients, queries: Grid, tokens: Grid, boundary: str
):
    tile = tile_of(queries, backend.tile_number())
    num_points = points.weights.shape[-1]
    number = backend.iota(1 << (num_points - 1).bit_length())[None, :]
    blocks = channel_blocks(values.shape[-1])
    d_rows = [tile.read_channels(d_out, first, size) for first, size in blocks]
    x, y, point = tile.point(points, jnp.minimum(number, num_points - 1))
    columns, rows = corners(x, queries.w, boundary), corners(y, queries.h, boundary)

    def products_with(token_tile):
        """dA [queries, tokens]."""
        d_matrix = None
        for (first, size), d_row in zip(blocks, d_rows, strict=True):
            row = token_tile.read_channels(values, first, size)
            d_matrix = _add_product(d_matrix, d_row, row)
        return d_matrix

    d_dx = d_dy = d_weight = jnp.zeros(x.shape, jnp.float32)
    for n, product in enumerate(_products(products_with, columns, rows, tokens)):
        j, i = divmod(n, 2)
        d_weight = backend.fma(rows.weight[j] * columns.weight[i], product, d_weight)
        d_dx = backend.fma(rows.weight[j] * columns.slope[i], product, d_dx)
        d_dy = backend.fma(rows.slope[j] * columns.weight[i], product, d_dy)
    pulled = point.pull_back(point.weight * d_dx, point.weight * d_dy, d_weight)
    exists = number < num_points
    for ref, gradient in zip(gradients, pulled, strict=True):
        if isinstance(gradient, tuple):
            tile.write_points(ref, number, 0, value=gradient[0], exists=exists)
            tile.write_points(ref, number, 1, value=gradient[1], exists=exists)
        else:
            tile.write_points(ref, number, value=gradient, exists=exists)


def _products(products_with: Callable, columns: Corners, rows: Corners, tokens: Grid):
    """d out . v of the four corners of each point, row by row, [queries, points] each.

    products_with(token_tile) is dA [queries, tokens] of one tile.
    """
    if tokens.tiles == 1:
        local = [row * tokens.tile_w + column for row in rows.index for column in columns.index]
        return _entries(products_with(tile_of(tokens, jnp.int32(0))), local)

    def add_tile(number, products):
        d_matrix = products_with(tile_of(tokens, number))
        left, top = tokens.first(number)
        inside, local = [], []
        for row in rows.index:
            row = row - top
            for column in columns.index:
                column = column - left
                here = (row >= 0) & (row < tokens.tile_h)
                here &= (column >= 0) & (column < tokens.tile_w)
                inside.append(here)
                local.append(jnp.where(here, row * tokens.tile_w + column, 0))
        found = _entries(d_matrix, local)
        return tuple(
            jnp.where(here, new, old)
            for here, new, old in zip(inside, found, products, strict=True)
        )

    def add_row_of_tiles(row, products):
        first = row * tokens.tiles_x
        return jax.lax.fori_loop(first + first_x, first + end_x, add_tile, products)

    first_x, end_x = _tiles_reached(columns.index, tokens.tile_w)
    first_y, end_y = _tiles_reached(rows.index, tokens.tile_h)
    zeros = jnp.zeros(columns.index[0].shape, jnp.float32)
    return jax.lax.fori_loop(first_y, end_y, add_row_of_tiles, (zeros,) * 4)


def _tiles_reached(index, size: int):
    """(first, end) of the tiles along an axis that hold the corners `index`."""
    first, last = jnp.min(index[0]), jnp.max(index[1])
    size = jnp.int32(size)
    return jax.lax.div(first, size), jax.lax.div(last, size) + 1


def _add_product(total: jax.Array | None, left: jax.Array, right: jax.Array) -> jax.Array:
    """total + left right^T in float32; float32 keeps its precision on bfloat16 tensor cores."""
    if left.dtype != jnp.float32:
        pairs = [(left, right)]
    else:
        left, right = split_bfloat16(left), split_bfloat16(right)
        order = ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))  # smallest first
        pairs = [(left[i], right[j]) for i, j in order]
    for a, b in pairs:
        product = backend.dot(a, b.T)
        total = product if total is None else total + product
    return total


def _entries(matrix: jax.Array, columns: list[jax.Array]) -> list[jax.Array]:
    """[matrix[q, column[q, k]] for each of the four `columns`], [queries, points] each."""
    height, width = matrix.shape
    # Columns by fours before rows: in the matrix' own order, its rows would all begin in the same
    # bank of shared memory.
    table = matrix.reshape(height, width // 4, 4).transpose(1, 0, 2).reshape(height * width)
    row = backend.iota(height)[:, None]
    index = [(column >> 2) * (4 * height) + row * 4 + (column & 3) for column in columns]
    pairs = [jnp.stack(index[:2], axis=-1), jnp.stack(index[2:], axis=-1)]
    index = jnp.stack(pairs, axis=-1)  # one look-up for all, so that the table is written once
    found = backend.take(table, index.reshape(index.size)).reshape(index.shape)
    shape = columns[0].shape
    halves = [half.reshape(*shape, 2) for half in jax.lax.split(found, (1, 1), axis=3)]
    entries = [jax.lax.split(half, (1, 1), axis=2) for half in halves]
    return [entry.reshape(shape) for half in entries for entry in half]
