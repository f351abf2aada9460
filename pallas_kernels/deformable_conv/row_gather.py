"""Kernels that gather rows of values from shared memory, for NVIDIA's Hopper.

A block has a group's image, or the band of its tokens that the block's queries need, in shared
memory. A warp takes 32 queries, of which each lane evaluates one's sampling points; then it gathers
for four queries at a time: eight lanes read the rows at a point's four corners, each its part of
the channels, with the point's token and weights shuffled from the query's own lane. A band that
does not fit, as offsets may be of any size, is gathered from global memory instead. Nothing is
shared between queries, so every run gives the same bits.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from pallas_kernels.deformable_conv.channel_rows import (
    SHARERS,
    Layout,
    Rows,
    halves,
)
from pallas_kernels.deformable_conv.group import (
    Extents,
    Group,
    point_gradient_structs,
)
from pallas_kernels.deformable_conv.image import Image, image_of
from pallas_kernels.deformable_conv.inner_corners import corners_of_points, gradients_of_points
from pallas_kernels.deformable_conv.launch import launch
from pallas_kernels.deformable_conv.point_rows import QUERIES, WORD, exchange_bytes
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp
from pallas_kernels.deformable_conv.windows import COPY_BYTES, for_each_tile_with_window

AT_A_TIME = LANES // SHARERS  # queries
MAX_POINTS = 9  # whose corners fit into registers
MAX_CHANNELS = 128  # whose sums do
UNROLLED = 4  # steps of a copy, so that their addresses are computed while others are on the way


def why_not(h: int, w: int, channels: int, num_points: int) -> str | None:
    """Why the kernels can't take such values and points; None if they can."""
    if min(h, w) < 2:
        return f"the images are {h} x {w}; expected two rows and two columns at least"
    if channels % SHARERS or channels > MAX_CHANNELS:
        return f"there are {channels} channels; expected a multiple of {SHARERS} to {MAX_CHANNELS}"
    if num_points > MAX_POINTS:
        return f"there are {num_points} points; expected at most {MAX_POINTS}"
    return None


def fits(h: int, w: int, channels: int, dtype) -> bool:
    """Whether the forward finds room for a whole image, with eight warps."""
    image = Image(1, h, w, channels, MAX_POINTS, np.dtype(dtype), "zeros")
    return Layout(image, 8, QUERIES * WORD * (4 * MAX_POINTS | 1)).rows == h


def _layout(values, points: Points, h: int, w: int, boundary: str, num_warps: int, table: int):
    """With `table` words a query of each warp."""
    image = image_of(values, points, h, w, boundary)
    own = max(QUERIES * WORD * table, exchange_bytes(points))
    return Layout(image, num_warps, own)


def forward(values, points, *, h: int, w: int, boundary: str, num_warps: int, interpret: bool):
    """out [B, tokens, G, C] of values [B, tokens, G, C] and points with flattened tokens."""
    layout = _layout(values, points, h, w, boundary, num_warps, 0)
    (out,) = launch(
        functools.partial(_forward_kernel, layout=layout),
        name="deformable_forward_row_gather",
        num_blocks=values.shape[0] * layout.image.groups * layout.share.blocks,
        shared_bytes=layout.shared_bytes,
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
    h: int,
    w: int,
    dtypes: tuple,
    boundary: str,
    num_warps: int,
    interpret: bool,
) -> tuple[list[jax.Array], Extents]:
    """The gradients of points.per_query, in `dtypes`; values and d_out are [B, tokens, G, C].

    And where the sampling points lie, for `sparse_transpose.values_gradient`.
    """
    table = 4 * points.weights.shape[-1] | 1  # odd: lanes' rows begin in different banks
    layout = _layout(values, points, h, w, boundary, num_warps, table)
    image = layout.image
    *gradients, lowest, highest = launch(
        functools.partial(_point_gradients_kernel, layout=layout, table=table),
        name="deformable_point_gradients_row_gather",
        num_blocks=values.shape[0] * image.groups * layout.share.blocks,
        shared_bytes=layout.shared_bytes,
        points=points,
        inputs=(values, d_out),
        outputs=point_gradient_structs(points, dtypes, image),
        num_warps=num_warps,
        interpret=interpret,
    )
    return gradients, Extents(lowest, highest)


# --- kernels -------------------------------------------------------------------------------------


def _each_tile(group: Group, shared, scratch, values, layout: Layout, visit: Callable) -> None:
    """Calls visit(tile, words of its points, gather) for each tile of 32 queries of the warp.

    gather(x, y) are the channels of four tokens from that one, see `Rows.of_corners`.
    """
    warp, image = group.warp, layout.image
    rows = Rows(group, layout)
    pieces_of_token = layout.token_bytes // COPY_BYTES

    def copy(window):
        count = window.height * (image.w * pieces_of_token)

        def copy_piece(piece):
            token, number = window.y * image.w + piece // pieces_of_token, piece % pieces_of_token
            warp.copy_to_shared(
                shared + piece * COPY_BYTES,
                values,
                group.channel(token) + number * (COPY_BYTES // image.dtype.itemsize),
                mask=piece < count,
            )

        threads = warp.num_warps * LANES

        def copy_pieces(step, _):
            for n in range(UNROLLED):
                copy_piece((step * UNROLLED + n) * threads + warp.thread)

        warp.loop((count + (threads * UNROLLED - 1)) // (threads * UNROLLED), copy_pieces)

    def visit_with_window(tile, words, window, window_is_there):
        window_is_there()

        def gather(x, y):
            if window is None:
                return rows.of_corners(values, y * image.w + x)
            token = (y - window.y) * image.w + x
            return rows.of_corners_in_band(shared + token * layout.token_bytes)

        visit(tile, words, gather)

    for_each_tile_with_window(
        group,
        layout.share,
        shared,
        scratch,
        fits=lambda window: window.height < layout.rows + 1,
        copy=copy,
        visit=visit_with_window,
    )


def _forward_kernel(warp: Warp, points: Points, shared, values, out, *, layout: Layout):
    group = Group(warp, layout.image, warp.block // layout.share.blocks, points)
    rows = Rows(group, layout)
    scratch = shared + layout.rows_bytes + warp.warp * layout.own_bytes

    def visit(tile, words, gather):
        queries = group.queries(tile)
        corners = corners_of_points(group, words, queries)

        def four_queries(step, _):
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            zero = warp.constant(0.0)
            totals = [zero] * sum(piece.count for piece in layout.pieces)
            rest = [zero] * (4 if layout.rest else 0)
            for own in corners:
                point = jax.tree.map(lambda x: warp.shuffle(x, source), own)
                found = gather(point.x, point.y)
                for weight, row in zip(point.weights, found.rows, strict=True):
                    totals = [t + weight * x for t, x in zip(totals, row, strict=True)]
                if layout.rest:
                    weight = rows.of_own_corner(point.weights)
                    rest = [t + weight * x for t, x in zip(rest, found.rest, strict=True)]
            last = rows.sum_of_rest(rest) if layout.rest else None
            rows.store(out, queries.first + source, totals, last)

        warp.loop(QUERIES // AT_A_TIME, four_queries)

    _each_tile(group, shared, scratch, values, layout, visit)


def _point_gradients_kernel(
    warp: Warp, points: Points, shared, values, d_out, *outputs, layout: Layout, table: int
):
    image = layout.image
    gradients, extents_refs = outputs[:-2], Extents(*outputs[-2:])
    group = Group(warp, image, warp.block // layout.share.blocks, points)
    rows = Rows(group, layout)
    scratch = shared + layout.rows_bytes + warp.warp * layout.own_bytes
    corner = (rows.share & 1) * 2 + (rows.share >> 1 & 1)

    def sum_of_lanes(products: list):
        """The sum over a query's lanes of the product number `corner`."""
        products = halves(warp, products, (rows.share & 1) == 1, rows.partner(1))
        (total,) = halves(warp, products, (rows.share >> 1 & 1) == 1, rows.partner(2))
        return total + warp.shuffle(total, rows.partner(4))

    def product(a: list, b: list):
        return functools.reduce(
            lambda total, pair: total + pair[0] * pair[1],
            zip(a, b, strict=True),
            warp.constant(0.0),
        )

    def visit(tile, words, gather):
        queries = group.queries(tile)
        corners = [(x.x, x.y) for x in corners_of_points(group, words, queries)]
        group.store_extents(
            group.extents([y * image.w + x for x, y in corners]), tile, extents_refs
        )

        def load(step):
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            return rows.of_token(d_out, group.inside(queries.first + source))

        def four_queries(step, d_row):
            last = QUERIES // AT_A_TIME - 1
            following = load(warp.select(step < last, step + 1, warp.constant(last)))
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            place = scratch + source * (table * WORD) + corner * WORD
            for k, own in enumerate(corners):
                found = gather(*(warp.shuffle(x, source) for x in own))
                products = [product(d_row.rows[0], row) for row in found.rows]
                if layout.rest:
                    rest = product(d_row.rest, found.rest)
                    products = [
                        warp.select(rows.is_own_corner(n), x + rest, x)
                        for n, x in enumerate(products)
                    ]
                total = sum_of_lanes(products)
                warp.store_shared_where(rows.share < 4, place + (4 * k) * WORD, total)
            return following

        warp.loop(QUERIES // AT_A_TIME, four_queries, load(warp.constant(0)))
        warp.wait_for_lanes()
        row = scratch + warp.lane * (table * WORD)
        products = [
            [warp.load_shared(row + (4 * k + n) * WORD) for n in range(4)]
            for k in range(image.num_points)
        ]
        pulled = gradients_of_points(group, words, queries, products)
        group.points.store_gradients(gradients, tile, pulled, scratch)

    _each_tile(group, shared, scratch, values, layout, visit)
