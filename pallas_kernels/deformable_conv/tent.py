"""Kernels that multiply by the interpolation matrix, on tensor cores.

For one group, let A[q, j] be the weight that query q gives to token j. Then out = A v and
d values = A^T d out: no gather, no scatter, no atomics. A is never whole: for a tile of queries and
a tile of tokens, A[q, j] = sum over k of weight_k * ty_k[j] * tx_k[j], where tx and ty are the
bilinear tents along the axes (`interpolation.axis_weights`). Their products are the kernels' main
work: K multiply-adds for each pair of a query and a token. So pairs of tiles that no sampling point
connects are skipped.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import triton as backend
from pallas_kernels.deformable_conv.grid import Grid
from pallas_kernels.deformable_conv.interpolation import axis_weights, split_bfloat16
from pallas_kernels.deformable_conv.tiles import Tile, channel_blocks, tile_of

# A sample weighs tokens less than one before it, and less than this many after it.
_AHEAD = {"zeros": 1.0, "truncate": 2.0}


def forward(
    values,
    points,
    *,
    queries: Grid,
    tokens: Grid,
    boundary: str,
    num_warps: int,
    interpret: bool,
):
    """out [B, tokens, G, C] of 16-bit values [B, tokens, G, C] and points with flattened tokens.

    `queries` and `tokens` cut the same image into the tiles of the two sides of A.
    """
    (out,) = backend.launch(
        functools.partial(_forward_kernel, queries=queries, tokens=tokens, boundary=boundary),
        name="deformable_forward_tent",
        tiles=queries.tiles,
        points=points,
        inputs=(values,),
        outputs=(jax.ShapeDtypeStruct(values.shape, values.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return out


def _forward_kernel(points, values, out, *, queries: Grid, tokens: Grid, boundary: str):
    tile = tile_of(queries, backend.tile_number())
    blocks = channel_blocks(values.shape[-1])
    found = tile.all_points(points)
    zero = backend.opaque_zero(values.dtype)

    def add_tile(number, totals):
        token_tile = tile_of(tokens, number)
        matrix = backend.matrix_of_zeros(queries.tile_size, tokens.tile_size, zero)
        for x, y, weight in found:
            matrix = _add_point(matrix, x, y, weight, token_tile, boundary)
        matrix = matrix.astype(values.dtype)
        return tuple(
            total + backend.dot(matrix, token_tile.read_channels(values, first, size))
            for total, (first, size) in zip(totals, blocks, strict=True)
        )

    zeros = tuple(jnp.zeros((queries.tile_size, size), jnp.float32) for _, size in blocks)
    first_row, last_row = _rows_reached([y for _, y, _ in found], tokens, boundary)
    totals = jax.lax.fori_loop(
        first_row * tokens.tiles_x, last_row * tokens.tiles_x, add_tile, zeros
    )
    for (first, _), total in zip(blocks, totals, strict=True):
        tile.write_channels(out, first, total)


def _add_point(matrix, x, y, weight, tokens: Tile, boundary: str) -> jax.Array:
    """`matrix` [queries, tokens] and one sampling point's part of A; the rest are [queries]."""
    over_columns, over_rows = (
        axis_weights(
            coordinate[:, None], token.astype(jnp.float32)[None, :], boundary, backend.tent
        )
        for coordinate, token in ((x, tokens.x), (y, tokens.y))
    )
    return backend.fma(weight[:, None] * over_columns, over_rows, matrix)


def _rows_reached(ys, tokens: Grid, boundary: str):
    """(first, end) of the rows of token tiles that coordinates `ys` sample."""
    low = jnp.min(functools.reduce(jnp.minimum, ys)) - 1.0
    high = jnp.max(functools.reduce(jnp.maximum, ys)) + _AHEAD[boundary]
    height = jnp.int32(tokens.tile_h)
    first = jnp.clip(low, 0.0, float(tokens.h - 1)).astype(jnp.int32)
    last = jnp.clip(high, -1.0, float(tokens.h - 1)).astype(jnp.int32)
    end = jnp.where(high < 0, 0, jax.lax.div(last, height) + 1)
    return jax.lax.div(first, height), end


def values_gradient(
    points,
    d_out,
    *,
    queries: Grid,
    tokens: Grid,
    tiles_per_program: int,
    skip: bool,
    boundary: str,
    num_warps: int,
    interpret: bool,
):
    """d values [B, tokens, G, C] of d_out [B, tokens, G, C] and points with flattened tokens.

    With `skip`, which pairs of tiles a sampling point connects is found beforehand, and the others
    are left out: it pays where the image has many tiles. Without, a program does several tiles of
    tokens with the coordinates of one tile of queries.
    """
    connections = ()
    if skip:
        connections = (_connections(points, queries, tokens, boundary, interpret),)
    kernel = functools.partial(
        _values_gradient_kernel,
        queries=queries,
        tokens=tokens,
        tiles_per_program=tiles_per_program,
        boundary=boundary,
    )
    (d_values,) = backend.launch(
        kernel,
        name="deformable_values_gradient",
        tiles=-(-tokens.tiles // tiles_per_program),
        points=points,
        inputs=(d_out, *connections),
        outputs=(jax.ShapeDtypeStruct(d_out.shape, d_out.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return d_values


def _values_gradient_kernel(
    points,
    d_out,
    *connections_and_output,
    queries: Grid,
    tokens: Grid,
    tiles_per_program: int,
    boundary: str,
):
    *connections, d_values = connections_and_output
    blocks = channel_blocks(d_out.shape[-1])
    zero = backend.opaque_zero(jnp.bfloat16 if d_out.dtype == jnp.float32 else d_out.dtype)
    first_tile = backend.tile_number() * tiles_per_program
    numbers = [first_tile + i for i in range(tiles_per_program)]
    token_tiles = [tile_of(tokens, number) for number in numbers]

    def add_tile(query_number, totals, connected):
        tile = tile_of(queries, query_number)
        rows = [tile.read_channels(d_out, first, size) for first, size in blocks]
        num_points = points.weights.shape[-1]
        found = tile.all_points(points) if connected is None else None
        totals = list(totals)
        for i, token_tile in enumerate(token_tiles):
            matrix = backend.matrix_of_zeros(queries.tile_size, tokens.tile_size, zero)
            for k in range(num_points):

                def add_point(matrix, k=k, token_tile=token_tile):
                    if found:
                        x, y, weight = found[k]
                    else:
                        x, y, point = tile.point(points, k)
                        weight = point.weight
                    return _add_point(matrix, x, y, weight, token_tile, boundary)

                if connected is None:
                    matrix = add_point(matrix)
                else:
                    here = jax.lax.shift_right_logical(connected, jnp.int32(k)) & 1
                    matrix = jax.lax.cond(here != 0, add_point, lambda matrix: matrix, matrix)
            for j, row in enumerate(rows):
                totals[i * len(blocks) + j] += _transposed_product(matrix, row)
        return tuple(totals)

    def visit_tile(query_number, totals):
        if not connections:
            return add_tile(query_number, totals, None)
        connected = connections[0][query_number, numbers[0]]
        return jax.lax.cond(
            connected != 0,
            lambda totals: add_tile(query_number, totals, connected),
            lambda totals: totals,
            totals,
        )

    zeros = [jnp.zeros((tokens.tile_size, size), jnp.float32) for _, size in blocks]
    totals = jax.lax.fori_loop(0, queries.tiles, visit_tile, tuple(zeros * tiles_per_program))
    for i, token_tile in enumerate(token_tiles):
        for j, (first, _) in enumerate(blocks):
            token_tile.write_channels(d_values, first, totals[i * len(blocks) + j])


def _connections(points, queries: Grid, tokens: Grid, boundary: str, interpret: bool) -> jax.Array:
    """[B, query tiles, G, token tiles] int32: bit k says whether point k connects the two tiles."""
    batch, _, groups, num_points = points.weights.shape
    (reach,) = backend.launch(
        functools.partial(_reach_kernel, queries=queries),
        name="deformable_reach",
        tiles=queries.tiles,
        points=points,
        inputs=(),
        outputs=(jax.ShapeDtypeStruct((batch, queries.tiles, groups, num_points, 4), jnp.float32),),
        num_warps=2,
        interpret=interpret,
    )
    left, top = (first.astype(jnp.float32) for first in tokens.first(jnp.arange(tokens.tiles)))
    ahead = _AHEAD[boundary]
    bits = jnp.zeros((batch, queries.tiles, groups, tokens.tiles), jnp.int32)
    for k in range(num_points):
        low_x, high_x, low_y, high_y = (reach[:, :, :, k, i, None] for i in range(4))
        over_x = (low_x < left + tokens.tile_w) & (high_x > left - ahead)
        over_y = (low_y < top + tokens.tile_h) & (high_y > top - ahead)
        bits |= jnp.where(over_x & over_y, jnp.int32(1 << k), 0)
    return bits


def _reach_kernel(points, reach, *, queries: Grid):
    """reach[tile, k] = (least x, greatest x, least y, greatest y) of point k's coordinates."""
    number = backend.tile_number()
    tile = tile_of(queries, number)

    def one_point(k, carry):
        x, y, _ = tile.point(points, k)
        for i, coordinate in enumerate((x, y)):
            reach[number, k, 2 * i] = jnp.min(jnp.where(tile.inside, coordinate, jnp.inf))
            reach[number, k, 2 * i + 1] = jnp.max(jnp.where(tile.inside, coordinate, -jnp.inf))
        return carry

    jax.lax.fori_loop(0, points.weights.shape[-1], one_point, 0)


def _transposed_product(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """matrix^T rows in float32; float32 `rows` keep their precision on bfloat16 tensor cores."""
    if rows.dtype != jnp.float32:
        return backend.dot(matrix.astype(rows.dtype).T, rows)
    left, right = split_bfloat16(matrix), split_bfloat16(rows)
    total = 0.0
    for i, j in ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)):  # smallest first
        total += backend.dot(left[i].T, right[j])
    return total
