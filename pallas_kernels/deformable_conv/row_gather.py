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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_conv.group import Extents, Group, for_each_tile, num_tiles
from pallas_kernels.deformable_conv.image_block import Image, located
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES, launch
from pallas_kernels.deformable_conv.point_rows import QUERIES, WORD
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

SHARERS = 8  # lanes that share a query's channels
AT_A_TIME = LANES // SHARERS  # queries
MAX_POINTS = 9  # whose corners fit into registers
MAX_CHANNELS = 128  # whose sums do
LOAD_BYTES = 16  # at most, of one load


def why_not(h: int, w: int, channels: int, num_points: int) -> str | None:
    """Why the kernels can't take such values and points; None if they can."""
    if min(h, w) < 2:
        return f"the images are {h} x {w}; expected two rows and two columns at least"
    if channels % SHARERS or channels > MAX_CHANNELS:
        return f"there are {channels} channels; expected a multiple of {SHARERS} to {MAX_CHANNELS}"
    if num_points > MAX_POINTS:
        return f"there are {num_points} points; expected at most {MAX_POINTS}"
    return None


class Piece(NamedTuple):
    """Neighbouring channels of each of a query's lanes, which are loaded together."""

    first: int  # channel, of the first lane
    count: int


class Layout(NamedTuple):
    image: Image
    num_warps: int
    own_bytes: int  # of shared memory, for each warp

    @property
    def row_bytes(self) -> int:
        return self.image.channels * self.image.dtype.itemsize

    @property
    def capacity(self) -> int:
        """Tokens in shared memory."""
        room = MAX_SHARED_BYTES - self.num_warps * self.own_bytes
        return min(self.image.tokens, room // self.row_bytes)

    @property
    def whole(self) -> bool:
        """Whether a block has an image, else a band for one tile of queries a warp."""
        return self.capacity == self.image.tokens

    @property
    def parts(self) -> int:
        """Blocks that share an image."""
        return 1 if self.whole else -(-num_tiles(self.image) // self.num_warps)

    @property
    def shared_bytes(self) -> int:
        return self.capacity * self.row_bytes + self.num_warps * self.own_bytes

    @property
    def pieces(self) -> list[Piece]:
        left, first, pieces = self.image.channels // SHARERS, 0, []
        count = LOAD_BYTES // self.image.dtype.itemsize
        while left:
            while count > left:
                count //= 2
            pieces.append(Piece(first, count))
            left, first = left - count, first + count * SHARERS
        return pieces


def _layout(values, points: Points, h: int, w: int, boundary: str, num_warps: int, table: int):
    """With `table` words a query of each warp."""
    groups, channels = values.shape[2:]
    num_points = points.weights.shape[-1]
    image = Image(groups, h, w, channels, 1, num_points, np.dtype(values.dtype), boundary)
    words = 4 * num_points | 1  # of an exchange of points, at most
    return Layout(image, num_warps, QUERIES * WORD * max(table, words))


def forward(values, points, *, h: int, w: int, boundary: str, num_warps: int, interpret: bool):
    """out [B, tokens, G, C] of values [B, tokens, G, C] and points with flattened tokens."""
    layout = _layout(values, points, h, w, boundary, num_warps, 0)
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
    extent = jax.ShapeDtypeStruct((values.shape[0], image.groups, num_tiles(image)), jnp.int32)
    *gradients, lowest, highest = launch(
        functools.partial(_point_gradients_kernel, layout=layout, table=table),
        name="deformable_point_gradients_row_gather",
        num_blocks=values.shape[0] * image.groups * layout.parts,
        shared_bytes=layout.shared_bytes,
        points=points,
        inputs=(values, d_out),
        outputs=(
            *(
                jax.ShapeDtypeStruct(x.shape, dtype)
                for x, dtype in zip(points.per_query, dtypes, strict=True)
            ),
            extent,
            extent,
        ),
        num_warps=num_warps,
        interpret=interpret,
    )
    return gradients, Extents(lowest, highest)


# --- kernels -------------------------------------------------------------------------------------


class Corners(NamedTuple):
    """Four tokens around a sampling point, all inside the image; some may have no weight."""

    token: object  # the first; the next, and the two below
    rows: tuple  # weights of the two rows, times the point's
    columns: tuple


class Rows:
    """Rows of channels, as the lanes of a query have them."""

    def __init__(self, group: Group, layout: Layout):
        self.group, self.layout = group, layout
        self.pieces = layout.pieces
        self._share = group.warp.lane & (SHARERS - 1)
        w = layout.image.w
        self._neighbours = 0, 1, w, w + 1

    def _parts(self):
        """(piece, the lane's first channel of it)."""
        for piece in self.pieces:
            yield piece, self._share * piece.count + piece.first

    def of_token(self, ref, token) -> list:
        """The lane's channels of the token's row of `ref`, in float32."""
        channel = self.group.channel(token)
        return self._load(ref, lambda first: channel + first, 0)

    def of_corners(self, values, token) -> list[list]:
        """Of the rows of a token, the next, and the two below."""
        channel = self.group.channel(token)
        step = self.layout.image.groups * self.layout.image.channels
        return [
            self._load(values, lambda first: channel + first, x * step) for x in self._neighbours
        ]

    def of_corners_in_band(self, address) -> list[list]:
        """Of the same rows in shared memory, the first of which begins at `address`."""
        warp, image = self.group.warp, self.layout.image
        size = image.dtype.itemsize
        rows = []
        for x in self._neighbours:
            numbers = []
            for piece, first in self._parts():
                offset = x * self.layout.row_bytes
                place = address + first * size
                if piece.count * size < WORD:
                    words = [warp.load_shared_half(place, offset)]
                else:
                    words = warp.load_shared_words(place, piece.count * size // WORD, offset)
                numbers += self._numbers(words, piece)
            rows.append(numbers)
        return rows

    def store(self, ref, token, numbers: list) -> None:
        warp, image = self.group.warp, self.layout.image
        channel, numbers = self.group.channel(token), iter(numbers)
        mask = None if image.tokens % QUERIES == 0 else token < image.tokens
        for piece, first in self._parts():
            own = [next(numbers) for _ in range(piece.count)]
            if image.dtype.itemsize == WORD:
                warp.store_words(ref, channel + first, own, mask=mask)
            elif piece.count == 1:
                warp.store_half(ref, channel + first, warp.pack(*own, *own, image.dtype), mask=mask)
            else:
                pairs = zip(own[::2], own[1::2], strict=True)
                words = [warp.pack(*pair, image.dtype) for pair in pairs]
                warp.store_words(ref, channel + first, words, mask=mask)

    def _load(self, ref, index: Callable, step: int) -> list:
        warp, numbers = self.group.warp, []
        for piece, first in self._parts():
            size = piece.count * self.layout.image.dtype.itemsize
            if size < WORD:
                words = [warp.load_half(ref, index(first) + step)]
            else:
                words = warp.load_words(ref, index(first) + step, size // WORD)
            numbers += self._numbers(words, piece)
        return numbers

    def _numbers(self, words: list, piece: Piece) -> list:
        warp, dtype = self.group.warp, self.layout.image.dtype
        if dtype.itemsize == WORD:
            return [warp.as_float(word) for word in words]
        return [x for word in words for x in warp.unpack(word, dtype)][: piece.count]


def _each_tile(warp: Warp, group: Group, shared, values, layout: Layout, visit: Callable) -> None:
    """Calls visit(tile, words of its points, gather) for each tile of 32 queries of the warp.

    gather(token) are the channels of four rows, see `Rows.of_corners`.
    """
    image = layout.image
    rows = Rows(group, layout)
    scratch = shared + layout.capacity * layout.row_bytes + warp.warp * layout.own_bytes

    def from_band(first):
        return lambda token: rows.of_corners_in_band(shared + (token - first) * layout.row_bytes)

    if layout.whole:
        _copy(warp, group, shared, values, layout, warp.constant(0), image.tokens)

        def tile(number, words):
            visit(number, words, from_band(0))

        for_each_tile(warp, group.points, tile, scratch, ready=warp.wait_for_copies)
        return

    tiles = num_tiles(image)
    number = (warp.block % layout.parts) * warp.num_warps + warp.warp
    exists = number < tiles
    last = warp.constant(tiles - 1)
    number = warp.select(exists, number, last)
    words = group.points.exchange(group.points.load(number), scratch)
    extents = group.union(
        [group.extent(x.token) for x in _corners_of_all(group, words, group.queries(number))]
    )
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
    fits = count < layout.capacity + 1

    def with_band(_):
        _copy(warp, group, shared, values, layout, extents.lowest, count)
        warp.wait_for_copies()
        warp.when(exists, lambda _: visit(number, words, from_band(extents.lowest)))

    warp.when(fits, with_band)
    warp.when(
        exists & (warp.constant(layout.capacity) < count),
        lambda _: visit(number, words, functools.partial(rows.of_corners, values)),
    )


def _copy(warp: Warp, group: Group, shared, values, layout: Layout, first, count) -> None:
    """Begins to copy the rows of `count` tokens to shared memory."""
    pieces_of_row = layout.row_bytes // LOAD_BYTES
    threads = warp.num_warps * LANES
    pieces = count * pieces_of_row
    static = isinstance(count, int)
    full = static and pieces % threads == 0

    def copy(step, _):
        piece = step * threads + warp.thread
        token, number = piece // pieces_of_row, piece % pieces_of_row
        warp.copy_to_shared(
            shared + piece * LOAD_BYTES,
            values,
            group.channel(first + token) + number * (LOAD_BYTES // layout.image.dtype.itemsize),
            mask=None if full else piece < pieces,
        )

    steps = -(-pieces // threads) if static else (pieces + (threads - 1)) // threads
    warp.loop(steps, copy)


def _corners_of_all(group: Group, words: list, queries) -> list[Corners]:
    function = functools.partial(_corners, image=group.image)
    return [
        group.warp.apply(function, group.points.fields(x, k), queries.x, queries.y)
        for k, x in enumerate(words)
    ]


def _forward_kernel(warp: Warp, points: Points, shared, values, out, *, layout: Layout):
    group = Group(warp, layout.image, warp.block // layout.parts, points)
    rows = Rows(group, layout)

    def visit(tile, words, gather):
        queries = group.queries(tile)
        corners = _corners_of_all(group, words, queries)

        def four_queries(step, _):
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            totals = [warp.constant(0.0)] * (layout.image.channels // SHARERS)
            for own in corners:
                point = jax.tree.map(lambda x: warp.shuffle(x, source), own)
                weights = [y * x for y in point.rows for x in point.columns]
                for weight, row in zip(weights, gather(point.token), strict=True):
                    totals = [t + weight * x for t, x in zip(totals, row, strict=True)]
            rows.store(out, queries.first + source, totals)

        warp.loop(QUERIES // AT_A_TIME, four_queries)

    _each_tile(warp, group, shared, values, layout, visit)


def _point_gradients_kernel(
    warp: Warp, points: Points, shared, values, d_out, *outputs, layout: Layout, table: int
):
    image = layout.image
    gradients, extents_refs = outputs[:-2], Extents(*outputs[-2:])
    group = Group(warp, image, warp.block // layout.parts, points)
    rows = Rows(group, layout)
    scratch = shared + layout.capacity * layout.row_bytes + warp.warp * layout.own_bytes
    share = warp.lane & (SHARERS - 1)
    first_bit, second_bit = (share & 1) == 1, (share & 2) == 2
    partners = [warp.lane + n - (warp.lane & n) * 2 for n in (1, 2, 4)]

    def sum_of_lanes(products: list):
        """Sums of four numbers over a query's lanes; lane n has that of number n >> 1 & 1 | ..."""

        def halve(low, high, bit, partner):
            kept, sent = warp.select(bit, high, low), warp.select(bit, low, high)
            return kept + warp.shuffle(sent, partner)

        a = halve(products[0], products[2], first_bit, partners[0])
        b = halve(products[1], products[3], first_bit, partners[0])
        total = halve(a, b, second_bit, partners[1])
        return total + warp.shuffle(total, partners[2])

    corner = (share & 1) * 2 + (share >> 1 & 1)

    def visit(tile, words, gather):
        queries = group.queries(tile)
        tokens = [x.token for x in _corners_of_all(group, words, queries)]
        group.store_extents(
            group.union([group.extent(token) for token in tokens]), tile, extents_refs
        )

        def four_queries(step, _):
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            d_row = rows.of_token(d_out, group.inside(queries.first + source))
            place = scratch + source * (table * WORD) + corner * WORD
            for k, own in enumerate(tokens):
                products = []
                for row in gather(warp.shuffle(own, source)):
                    pairs = list(zip(d_row, row, strict=True))
                    total = pairs[0][0] * pairs[0][1]
                    for a, b in pairs[1:]:
                        total = total + a * b
                    products.append(total)
                total = sum_of_lanes(products)
                warp.store_shared_where(share < 4, place + (4 * k) * WORD, total)

        warp.loop(QUERIES // AT_A_TIME, four_queries)
        warp.wait_for_lanes()
        row = scratch + warp.lane * (table * WORD)
        pulled = []
        for k, x in enumerate(words):
            products = [warp.load_shared(row + (4 * k + n) * WORD) for n in range(4)]
            function = functools.partial(_gradients_of_point, image=image)
            fields = group.points.fields(x, k)
            pulled.append(warp.apply(function, fields, queries.x, queries.y, products))
        group.points.store_gradients(gradients, tile, pulled, scratch)

    _each_tile(warp, group, shared, values, layout, visit)


# --- arithmetic of one lane's point, in JAX -------------------------------------------------------


def _inside(corners, size: int):
    """(first token of two inside that hold the corners inside, weights of the two)."""
    first, (low, high) = corners.token[0], corners.weight
    token = jnp.clip(first, 0, size - 2)
    before, after = first < token, token < first
    return token, (
        jnp.where(before, high, jnp.where(after, 0.0, low)),
        jnp.where(after, low, jnp.where(before, 0.0, high)),
    )


def _corners(points: Points, query_x, query_y, *, image: Image) -> Corners:
    point, columns, rows = located(points, query_x, query_y, image)
    column, column_weights = _inside(columns, image.w)
    row, row_weights = _inside(rows, image.h)
    return Corners(
        row * image.w + column, tuple(x * point.weight for x in row_weights), column_weights
    )


def _gradients_of_point(points: Points, query_x, query_y, products, *, image: Image):
    """The gradients of the point's fields from d out . v of `Corners`' four tokens."""
    point, columns, rows = located(points, query_x, query_y, image)

    def where_they_lie(corners, size, low, high):
        """Of the two tokens inside, in the places of the corners; those outside count nothing."""
        first = corners.token[0]
        token = jnp.clip(first, 0, size - 2)
        return jnp.where(token < first, high, low), jnp.where(first < token, low, high)

    halves = [where_they_lie(columns, image.w, *products[i : i + 2]) for i in (0, 2)]
    lefts, rights = (where_they_lie(rows, image.h, *x) for x in zip(*halves, strict=True))
    d_dx = d_dy = d_weight = 0.0
    for j, row in enumerate(zip(lefts, rights, strict=True)):
        for i, product in enumerate(row):
            d_weight += rows.weight[j] * columns.weight[i] * product
            d_dx += rows.weight[j] * columns.slope[i] * product
            d_dy += rows.slope[j] * columns.weight[i] * product
    return point.pull_back(point.weight * d_dx, point.weight * d_dy, d_weight)
