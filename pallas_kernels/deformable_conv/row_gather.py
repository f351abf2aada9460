"""Kernels that gather rows of values from shared memory, for NVIDIA's Hopper.

A block has a group's image, or the band of its tokens that the block's queries need, in shared
memory. A warp takes 32 queries, of which each lane evaluates one's sampling points and tells the
others where they are: through a table in shared memory, or by shuffles. Then the warp gathers for
four queries at a time: eight lanes read the rows at a point's four corners, each its part of the
channels. Of a band that does not fit, half of the channels come after the other half; if half of
them do not fit either, as offsets may be of any size, rows are gathered from global memory. Nothing
is shared between queries, so every run gives the same bits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels.deformable_conv.channel_rows import (
    LOAD_BYTES,
    SHARERS,
    Layout,
    Rows,
    halves,
)
from pallas_kernels.deformable_conv.group import (
    Extents,
    Group,
    for_each_tile,
    num_tiles,
    point_gradient_structs,
)
from pallas_kernels.deformable_conv.image import Image, image_of
from pallas_kernels.deformable_conv.inner_corners import (
    corners_of_points,
    gradients_of_points,
    three_weights,
    weights_of_three,
)
from pallas_kernels.deformable_conv.launch import launch
from pallas_kernels.deformable_conv.limits import MAX_ELEMENTS
from pallas_kernels.deformable_conv.point_rows import QUERIES, WORD, exchange_bytes
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

AT_A_TIME = LANES // SHARERS  # queries
MAX_POINTS = 9  # whose corners fit into registers
MAX_CHANNELS = 128  # whose sums do
POINT_WORDS = 4  # of a point in the forward's table: a place, and what weights are made of
UNROLLED = 4  # steps of a copy, so that their addresses are computed while others are on the way


def why_not(h: int, w: int, channels: int, num_points: int) -> str | None:
    """Why the kernels can't take such values and points; None if they can."""
    if min(h, w) < 2:
        return f"the images are {h} x {w}; expected two rows and two columns at least"
    if channels % SHARERS or channels > MAX_CHANNELS:
        return f"there are {channels} channels; expected a multiple of {SHARERS} to {MAX_CHANNELS}"
    if num_points > MAX_POINTS:
        return f"there are {num_points} points; expected at most {MAX_POINTS}"
    if h * w * channels * WORD > MAX_ELEMENTS:  # places are in bytes
        return f"the images are {h} x {w}; expected such that int32 counts their bytes"
    return None


def fits(h: int, w: int, channels: int, dtype) -> bool:
    """Whether the forward finds room for a whole image, with eight warps."""
    image = Image(1, h, w, channels, MAX_POINTS, np.dtype(dtype), "zeros")
    return Layout(image, 8, QUERIES * WORD * _table(MAX_POINTS), 0, channels).whole


def _table(num_points: int) -> int:
    """Words a query in the forward's table; so that eight lanes' points are in different banks."""
    return POINT_WORDS * (num_points | 1)


def _layout(values, points: Points, h: int, w: int, boundary: str, num_warps: int, table: int):
    """With `table` words a query of each warp."""
    image = image_of(values, points, h, w, boundary)
    own = max(QUERIES * WORD * table, exchange_bytes(points))
    return Layout(image, num_warps, own, 0, image.channels)


def forward(values, points, *, h: int, w: int, boundary: str, num_warps: int, interpret: bool):
    """out [B, tokens, G, C] of values [B, tokens, G, C] and points with flattened tokens."""
    layout = _layout(values, points, h, w, boundary, num_warps, _table(points.weights.shape[-1]))
    (out,) = launch(
        functools.partial(_forward_kernel, layout=layout),
        name="deformable_forward_row_gather",
        num_blocks=values.shape[0] * layout.image.groups * layout.parts,
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
        num_blocks=values.shape[0] * image.groups * layout.parts,
        shared_bytes=layout.shared_bytes,
        points=points,
        inputs=(values, d_out),
        outputs=point_gradient_structs(points, dtypes, image),
        num_warps=num_warps,
        interpret=interpret,
    )
    return gradients, Extents(lowest, highest)


# --- kernels -------------------------------------------------------------------------------------


class Gather(NamedTuple):
    """How a lane finds channels of the four tokens around a point: one visit of a tile's points."""

    rows: Rows  # of those channels
    place: Callable  # of the first token's x and y: its place, which other lanes may have computed
    load: Callable  # of that place, see `Rows.of_corners`

    @property
    def is_first(self) -> bool:
        return self.rows.layout.first == 0

    @property
    def is_last(self) -> bool:
        layout = self.rows.layout
        return layout.first + layout.channels == layout.image.channels


def _each_tile(warp: Warp, group: Group, shared, values, layout: Layout, visit: Callable) -> None:
    """Calls visit(tile, words of its points, a Gather) for each tile of 32 queries of the warp.

    Once if all channels of the block's tokens fit into shared memory; twice, for one half of the
    channels after the other, if half of them do; else once, and values are in global memory.
    """
    image = layout.image
    scratch = shared + layout.tokens_bytes + warp.warp * layout.own_bytes

    def from_band(first, layout: Layout):
        rows = Rows(group, layout)

        def place(x, y):
            return shared + y * layout.pitch_bytes + (x - first) * layout.row_bytes

        return Gather(rows, place, rows.of_corners_in_band)

    if layout.whole:
        tokens = warp.constant(0), image.tokens

        def copy():
            _copy(Rows(group, layout), shared, values, *tokens)

        def tile(number, words, is_there):
            is_there()
            visit(number, words, from_band(0, layout))

        for_each_tile(group, copy, tile, scratch)
        return

    tiles = num_tiles(image)
    number = (warp.block % layout.parts) * warp.num_warps + warp.warp
    exists = number < tiles
    last = warp.constant(tiles - 1)
    number = warp.select(exists, number, last)
    words = group.points.exchange(group.points.load(number), scratch)
    corners = corners_of_points(group, words, group.queries(number))
    extents = group.extents([x.y * image.w + x.x for x in corners])
    for n, x in enumerate(extents):
        warp.store_shared(shared + (warp.warp * 2 + n) * WORD, x)
    warp.wait_for_block()
    found = [
        [warp.load_shared_bits(shared + (i * 2 + n) * WORD) for n in range(2)]
        for i in range(warp.num_warps)
    ]
    extents = group.union([Extents(*x) for x in found])
    warp.wait_for_block()
    count = extents.highest - extents.lowest + (image.w + 2)

    def in_turn(layouts: list[Layout]):
        for n, some in enumerate(layouts):
            if n:
                warp.wait_for_block()
            _copy(Rows(group, some), shared, values, extents.lowest, count)
            warp.wait_for_copies()
            gather = from_band(extents.lowest, some)
            warp.when(exists, lambda _, gather=gather: visit(number, words, gather))

    room = layout.band
    warp.when(count < room + 1, lambda _: in_turn([layout]))
    if layout.halves:
        full, room = room, min(half.band for half in layout.halves)
        in_halves = (warp.constant(full) < count) & (count < room + 1)
        warp.when(in_halves, lambda _: in_turn(layout.halves))
    rows = Rows(group, layout)
    from_values = Gather(
        rows, lambda x, y: y * image.w + x, lambda token: rows.of_corners(values, token)
    )
    warp.when(exists & (warp.constant(room) < count), lambda _: visit(number, words, from_values))


def _copy(rows: Rows, shared, values, first, count) -> None:
    """Begins to copy the rows of `count` tokens to shared memory."""
    warp, layout = rows.group.warp, rows.layout
    image, pieces_of_row = layout.image, layout.row_bytes // LOAD_BYTES
    threads = warp.num_warps * LANES
    pieces = count * pieces_of_row
    padding = layout.pitch_bytes - image.w * layout.row_bytes
    full = isinstance(count, int) and pieces % (threads * UNROLLED) == 0

    def copy(piece):
        token, number = piece // pieces_of_row, piece % pieces_of_row
        place = piece * LOAD_BYTES
        if padding:
            place = place + (token // image.w) * padding
        warp.copy_to_shared(
            shared + place,
            values,
            rows.channel(first + token) + number * (LOAD_BYTES // image.dtype.itemsize),
            mask=None if full else piece < pieces,
        )

    def copy_several(step, _):
        for n in range(UNROLLED):
            copy((step * UNROLLED + n) * threads + warp.thread)

    warp.loop((pieces + (threads * UNROLLED - 1)) // (threads * UNROLLED), copy_several)


def _forward_kernel(warp: Warp, points: Points, shared, values, out, *, layout: Layout):
    image, table = layout.image, _table(layout.image.num_points)
    group = Group(warp, image, warp.block // layout.parts, points)
    scratch = shared + layout.tokens_bytes + warp.warp * layout.own_bytes

    def visit(tile, words, gather):
        queries, rows = group.queries(tile), gather.rows
        own_row = scratch + warp.lane * (table * WORD)
        for k, point in enumerate(corners_of_points(group, words, queries)):
            numbers = gather.place(point.x, point.y), *warp.apply(three_weights, point)
            warp.store_shared(own_row + k * POINT_WORDS * WORD, *numbers)
        warp.wait_for_lanes()

        def four_queries(step, _):
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            table_row = scratch + source * (table * WORD)
            zero = warp.constant(0.0)
            totals = [zero] * sum(piece.count for piece in rows.layout.pieces)
            rest = [zero] * (4 if rows.layout.rest else 0)
            for k in range(image.num_points):
                place, *numbers = warp.load_shared_words(
                    table_row, POINT_WORDS, k * POINT_WORDS * WORD
                )
                weights = weights_of_three(*map(warp.as_float, numbers))
                found = gather.load(place)
                for weight, row in zip(weights, found.rows, strict=True):
                    totals = [t + weight * x for t, x in zip(totals, row, strict=True)]
                if rest:
                    weight = rows.of_own_corner(weights)
                    rest = [t + weight * x for t, x in zip(rest, found.rest, strict=True)]
            last = rows.sum_of_rest(rest) if rest else None
            rows.store(out, queries.first + source, totals, last)

        warp.loop(QUERIES // AT_A_TIME, four_queries)
        warp.wait_for_lanes()

    _each_tile(warp, group, shared, values, layout, visit)


def _point_gradients_kernel(
    warp: Warp, points: Points, shared, values, d_out, *outputs, layout: Layout, table: int
):
    image = layout.image
    gradients, extents_refs = outputs[:-2], Extents(*outputs[-2:])
    group = Group(warp, image, warp.block // layout.parts, points)
    scratch = shared + layout.tokens_bytes + warp.warp * layout.own_bytes

    def sum_of_lanes(rows: Rows, products: list):
        """The sum over a query's lanes of a product, of number 2 (share & 1) + (share >> 1 & 1)."""
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
        queries, rows = group.queries(tile), gather.rows
        corner = (rows.share & 1) * 2 + (rows.share >> 1 & 1)
        corners = corners_of_points(group, words, queries)
        if gather.is_first:
            tokens = [x.y * image.w + x.x for x in corners]
            group.store_extents(group.extents(tokens), tile, extents_refs)
        places = [gather.place(x.x, x.y) for x in corners]

        def load(step):
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            return rows.of_token(d_out, group.inside(queries.first + source))

        def four_queries(step, d_row):
            last = QUERIES // AT_A_TIME - 1
            following = load(warp.select(step < last, step + 1, warp.constant(last)))
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            place = scratch + source * (table * WORD) + corner * WORD
            for k, own in enumerate(places):
                found = gather.load(warp.shuffle(own, source))
                products = [product(d_row.rows[0], row) for row in found.rows]
                if d_row.rest:
                    rest = product(d_row.rest, found.rest)
                    products = [
                        warp.select(rows.is_own_corner(n), x + rest, x)
                        for n, x in enumerate(products)
                    ]
                total, sum_place = sum_of_lanes(rows, products), place + (4 * k) * WORD
                if not gather.is_first:
                    total = total + warp.load_shared(sum_place)
                warp.store_shared_where(rows.share < 4, sum_place, total)
            return following

        warp.loop(QUERIES // AT_A_TIME, four_queries, load(warp.constant(0)))
        if not gather.is_last:
            return
        warp.wait_for_lanes()
        row = scratch + warp.lane * (table * WORD)
        products = [
            [warp.load_shared(row + (4 * k + n) * WORD) for n in range(4)]
            for k in range(image.num_points)
        ]
        pulled = gradients_of_points(group, words, queries, products)
        group.points.store_gradients(gradients, tile, pulled, scratch)

    _each_tile(warp, group, shared, values, layout, visit)
