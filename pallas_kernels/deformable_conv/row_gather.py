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
from pallas_kernels.deformable_conv.point_rows import QUERIES, WORD, words_of_point
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
        """Of the channels, but the last eight of an odd number of eights."""
        left, first, pieces = self.image.channels // SHARERS, 0, []
        left -= left % 2
        count = LOAD_BYTES // self.image.dtype.itemsize
        while left:
            while count > left:
                count //= 2
            pieces.append(Piece(first, count))
            left, first = left - count, first + count * SHARERS
        return pieces

    @property
    def rest(self) -> bool:
        """Whether there are eight channels that are in no piece.

        They are few for eight lanes, which therefore share the eights of all four corners.
        """
        return self.image.channels // SHARERS % 2 == 1


def _layout(values, points: Points, h: int, w: int, boundary: str, num_warps: int, table: int):
    """With `table` words a query of each warp."""
    groups, channels = values.shape[2:]
    num_points = points.weights.shape[-1]
    image = Image(groups, h, w, channels, 1, num_points, np.dtype(values.dtype), boundary)
    words = words_of_point(points) * num_points | 1  # of an exchange
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


class Four(NamedTuple):
    """What a lane has of the rows of four tokens, in float32."""

    rows: list  # of each row, the channels of the pieces
    rest: list  # of one row, four channels of the last eight; may be empty


class Rows:
    """Rows of channels, as the lanes of a query have them."""

    def __init__(self, group: Group, layout: Layout):
        self.group, self.layout = group, layout
        self.share = share = group.warp.lane & (SHARERS - 1)
        w = layout.image.w
        self._neighbours = 0, 1, w, w + 1
        self._firsts = [share * piece.count + piece.first for piece in layout.pieces]
        # Lanes 2 n and 2 n + 1 have the rest of the row of corner n.
        self._own_corner = share >> 1
        self._own_neighbour = (share >> 1 & 1) + (share >> 2) * w
        last = layout.image.channels - SHARERS
        self._own_first = (share & 1) * 4 + last
        # Of which each has one in the end, see `sum_of_rest`.
        self._own_channel = self._own_first + (share >> 1 & 1) * 2 + (share >> 2)

    def of_token(self, ref, token) -> Four:
        """The one row of `ref`, and its rest."""
        channel = self.group.channel(token)
        rest = self._load(ref, channel + self._own_first, 4) if self.layout.rest else []
        return Four([self._load_pieces(ref, channel, 0)], rest)

    def of_corners(self, values, token) -> Four:
        """The rows of a token, the next, and the two below."""
        channel = self.group.channel(token)
        step = self.layout.image.groups * self.layout.image.channels
        rows = [self._load_pieces(values, channel, x * step) for x in self._neighbours]
        rest = []
        if self.layout.rest:
            index = channel + self._own_neighbour * step + self._own_first
            rest = self._load(values, index, 4)
        return Four(rows, rest)

    def of_corners_in_band(self, address) -> Four:
        """The same in shared memory, where the first row begins at `address`."""
        warp, layout = self.group.warp, self.layout
        size = layout.image.dtype.itemsize

        def load(place, count: int, offset: int) -> list:
            words = warp.load_shared_words(place, count * size // WORD, offset)
            return self._numbers(words)

        places = [address + first * size for first in self._firsts]
        rows = [
            [
                number
                for place, piece in zip(places, layout.pieces, strict=True)
                for number in load(place, piece.count, x * layout.row_bytes)
            ]
            for x in self._neighbours
        ]
        rest = []
        if layout.rest:
            own = self._own_neighbour * layout.row_bytes + self._own_first * size
            rest = load(address + own, 4, 0)
        return Four(rows, rest)

    def of_own_corner(self, numbers: list):
        """Of four lanes' numbers, one for each corner, that of which the lane has the rest."""
        warp = self.group.warp
        right, below = (self._own_corner & 1) == 1, (self._own_corner >> 1) == 1
        upper, lower = (warp.select(right, numbers[n + 1], numbers[n]) for n in (0, 2))
        return warp.select(below, lower, upper)

    def is_own_corner(self, n: int):
        return self._own_corner == n

    def sum_of_rest(self, totals: list):
        """The sum over corners of the one of the last eight channels that the lane stores."""
        warp = self.group.warp
        right, below = (self._own_corner & 1) == 1, (self._own_corner >> 1) == 1
        totals = halves(warp, totals, right, self.partner(2))
        return halves(warp, totals, below, self.partner(4))[0]

    def partner(self, n: int):
        """The number of the lane of which bit n differs."""
        lane = self.group.warp.lane
        return lane + n - (lane & n) * 2

    def store(self, ref, token, numbers: list, last) -> None:
        """Writes what a lane has of the token's row, and its one of the last eight channels."""
        warp, image = self.group.warp, self.layout.image
        channel, numbers = self.group.channel(token), iter(numbers)
        mask = None if image.tokens % QUERIES == 0 else token < image.tokens
        wide = image.dtype.itemsize == WORD
        for piece, first in zip(self.layout.pieces, self._firsts, strict=True):
            words = [next(numbers) for _ in range(piece.count)]
            if not wide:
                pairs = zip(words[::2], words[1::2], strict=True)
                words = [warp.pack(*pair, image.dtype) for pair in pairs]
            warp.store_words(ref, channel + first, words, mask=mask)
        if self.layout.rest:
            index = channel + self._own_channel
            if wide:
                warp.store_words(ref, index, [last], mask=mask)
            else:
                warp.store_half(ref, index, warp.pack(last, last, image.dtype), mask=mask)

    def _load_pieces(self, ref, channel, step: int) -> list:
        pieces = zip(self._firsts, self.layout.pieces, strict=True)
        return [
            number
            for first, piece in pieces
            for number in self._load(ref, channel + first + step, piece.count)
        ]

    def _load(self, ref, index, count: int) -> list:
        words = count * self.layout.image.dtype.itemsize // WORD
        return self._numbers(self.group.warp.load_words(ref, index, words))

    def _numbers(self, words: list) -> list:
        warp, dtype = self.group.warp, self.layout.image.dtype
        if dtype.itemsize == WORD:
            return [warp.as_float(word) for word in words]
        return [x for word in words for x in warp.unpack(word, dtype)]


def halves(warp: Warp, totals: list, upper, partner) -> list:
    """Half of the totals of two lanes: the second half of the sums if `upper`, else the first."""
    half = len(totals) // 2
    return [
        warp.select(upper, b, a) + warp.shuffle(warp.select(upper, a, b), partner)
        for a, b in zip(totals[:half], totals[half:], strict=True)
    ]


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
            zero = warp.constant(0.0)
            totals = [zero] * sum(piece.count for piece in layout.pieces)
            rest = [zero] * (4 if layout.rest else 0)
            for own in corners:
                point = jax.tree.map(lambda x: warp.shuffle(x, source), own)
                weights = [y * x for y in point.rows for x in point.columns]
                found = gather(point.token)
                for weight, row in zip(weights, found.rows, strict=True):
                    totals = [t + weight * x for t, x in zip(totals, row, strict=True)]
                if layout.rest:
                    weight = rows.of_own_corner(weights)
                    rest = [t + weight * x for t, x in zip(rest, found.rest, strict=True)]
            last = rows.sum_of_rest(rest) if layout.rest else None
            rows.store(out, queries.first + source, totals, last)

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
        tokens = [x.token for x in _corners_of_all(group, words, queries)]
        group.store_extents(
            group.union([group.extent(token) for token in tokens]), tile, extents_refs
        )

        def load(step):
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            return rows.of_token(d_out, group.inside(queries.first + source))

        def four_queries(step, d_row):
            last = QUERIES // AT_A_TIME - 1
            following = load(warp.select(step < last, step + 1, warp.constant(last)))
            source = step * AT_A_TIME + (warp.lane // SHARERS)
            place = scratch + source * (table * WORD) + corner * WORD
            for k, own in enumerate(tokens):
                found = gather(warp.shuffle(own, source))
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
