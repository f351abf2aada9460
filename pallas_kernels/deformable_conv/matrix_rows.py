"""What a warp of `sparse_matrix.py`'s kernels has: 32 queries, their sampling points, their matrix.

Lanes' values are `warp.Lanes`; the arithmetic of a lane's own sampling point is JAX's.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.deformable_conv.image_block import CHUNK, CHUNK_BYTES, Image, located
from pallas_kernels.deformable_conv.interpolation import corners, discard_non_finite
from pallas_kernels.deformable_conv.point_rows import QUERIES, WORD, PointRows
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

COLUMNS = 16  # tokens of a block of the matrix: of one product
PADDING = 8  # columns of the matrix beyond a window's
TILES_OF_A_WARP = 4  # at least, where several blocks share an image
NOWHERE = 1 << 24  # a token that no window has


def image_of(values, points: Points, h: int, w: int, boundary: str) -> Image:
    """The sizes of values [B, tokens, G, C] and their points."""
    groups, channels = values.shape[2:]
    return Image(groups, h, w, channels, 1, points.weights.shape[-1], values.dtype, boundary)


class Layout(NamedTuple):
    """Where the values are: a group's image in shared memory, or, if not `resident`, of each warp
    the touched blocks of a window, copied when they are wanted; then `parts` blocks share an image.
    """

    image: Image
    matrix: "Matrix"
    num_warps: int
    resident: bool

    @property
    def parts(self) -> int:
        tiles = -(-self.image.tokens // QUERIES)
        return 1 if self.resident else -(-tiles // (TILES_OF_A_WARP * self.num_warps))

    @property
    def _own_bytes(self) -> int:
        """Of a warp."""
        stage = 0 if self.resident else self.matrix.columns * self.image.pitch
        return self.matrix.bytes + stage

    @property
    def shared_bytes(self) -> int:
        resident = image_bytes(self.image) if self.resident else 0
        return resident + self.num_warps * self._own_bytes

    def matrix_and_stage(self, shared, warp: Warp) -> tuple:
        """Addresses of the warp's."""
        resident = image_bytes(self.image) if self.resident else 0
        matrix = shared + resident + warp.warp * self._own_bytes
        return matrix, matrix + self.matrix.bytes


def column_blocks(image: Image) -> int:
    """How many blocks the matrix' columns are in."""
    return -(-image.tokens // COLUMNS)


def image_bytes(image: Image) -> int:
    """Of shared memory, with rows for all columns of the matrix."""
    return column_blocks(image) * COLUMNS * image.pitch


class Matrix(NamedTuple):
    """A warp's part of the matrix in shared memory: rows of queries, a window of columns.

    The columns beyond the window are where entries go that are not in it. Their number makes four
    neighbouring rows begin in different banks, as a product's loads need it.
    """

    window: int  # blocks of columns; a power of two, at least 2

    @property
    def columns(self) -> int:
        return self.window * COLUMNS

    @property
    def pitch(self) -> int:
        return WORD * (self.columns + PADDING)

    @property
    def bytes(self) -> int:
        return QUERIES * self.pitch


class Queries(NamedTuple):
    """The queries of a warp, one a lane. Beyond the last one, it is the last."""

    first: object
    token: object
    exists: object  # None if all do
    x: object  # float32
    y: object


class Group:
    """One group of one image, as one warp of a block sees it."""

    def __init__(self, warp: Warp, image: Image, number, shared, points: Points):
        self.warp, self.image = warp, image
        group = number % image.groups
        self._first = (number // image.groups) * (image.tokens * image.groups) + group
        self.points = PointRows(warp, image, points, group, self._first)
        self.shared = shared
        # Of a matrix of a product, a lane holds two neighbours in this row and 8 rows below it.
        self.row = warp.lane >> 2
        self.column = warp.lane & 3  # of pairs of columns
        chunks = range(image.chunks)
        self.chunk_pairs = [chunks[n : n + 2] for n in chunks[::2]]  # the last one may be alone

    def entry(self, token):
        """Number of the token's entry for this group, in arrays [B, tokens, G, ...]."""
        return self._first + token * self.image.groups

    def channel(self, token):
        """Number of the token's first channel, in arrays [B, tokens, G, C]."""
        return self.entry(token) * self.image.channels

    def inside(self, token):
        """The token, or the last one if it is beyond that, in a tile or block that exists."""
        if self.image.tokens % QUERIES == 0:
            return token
        last = self.warp.constant(self.image.tokens - 1)
        return self.warp.select(token < self.image.tokens, token, last)

    def copy_image(self, values):
        """Begins to copy all tokens' channels to shared memory; rows beyond them become zero."""
        warp, image = self.warp, self.image
        pieces = image.tokens * image.chunks
        threads = warp.num_warps * LANES

        def copy(step, _):
            piece = step * threads + warp.thread
            token, chunk = piece // image.chunks, piece % image.chunks
            warp.copy_to_shared(
                self.shared + token * image.pitch + chunk * CHUNK_BYTES,
                values,
                self.channel(token) + chunk * CHUNK,
                mask=None if pieces % threads == 0 else piece < pieces,
            )

        warp.loop(-(-pieces // threads), copy)
        first = image.tokens * image.pitch
        if first < image_bytes(image):
            self.clear(self.shared + first, image_bytes(image) - first)

    def clear(self, address, num_bytes: int):
        """Zeros `num_bytes` (a multiple of 16) from `address`, of this warp."""
        warp = self.warp
        zeros = [warp.constant(0.0)] * 4
        step = 16 * LANES

        def store(i, _):
            warp.store_shared(address + i * step + warp.lane * 16, *zeros)

        whole, rest = divmod(num_bytes, step)
        warp.loop(whole, store)
        if rest:
            place = warp.lane * 16
            place = warp.select(place < rest, place, warp.constant(rest - 16))
            warp.store_shared(address + whole * step + place, *zeros)

    def queries(self, tile) -> Queries:
        warp, image = self.warp, self.image
        first = tile * QUERIES
        token = first + warp.lane
        exists = None if image.tokens % QUERIES == 0 else token < image.tokens
        token = self.inside(token)
        x, y = warp.apply(
            lambda x, y: (x.astype(jnp.float32), y.astype(jnp.float32)),
            token % image.w,
            token // image.w,
        )
        return Queries(first, token, exists, x, y)

    # --- a sampling point of the lane's query -----------------------------------------------------

    def position(self, fields: Points, queries: Queries):
        """(x, y, weight) of a point."""
        return self.warp.apply(_position, fields, queries.x, queries.y)

    def corners(self, position):
        """(tokens, weights) of a point's four corners; a token whose weight is 0 is nowhere.

        No two tokens are the same, so that a lane may add to all four at a time.
        """
        warp = self.warp
        tokens, weights = warp.apply(functools.partial(_corners, image=self.image), position)
        nowhere = warp.constant(NOWHERE)
        pairs = zip(tokens, weights, strict=True)
        return [warp.select(weight == 0, nowhere, token) for token, weight in pairs], weights

    def tokens_inside(self, fields: Points, queries: Queries) -> list:
        """The tokens of a point's corners, those outside the image moved inside."""
        function = functools.partial(_tokens_inside, image=self.image)
        return self.warp.apply(function, fields, queries.x, queries.y)

    # --- the matrix -----------------------------------------------------------------------------

    def windows(self, tokens, matrix: Matrix):
        """Bits of the windows (modulo 32) that the queries' tokens are in, of all lanes."""
        warp = self.warp
        bits = []
        for token in tokens:
            bit = warp.constant(1) << ((token // matrix.columns) & 31)
            bits.append(warp.select(token < NOWHERE, bit, warp.constant(0)))
        return warp.union(functools.reduce(lambda a, b: a | b, bits))

    def place(self, token, first, matrix: Matrix):
        """(whether a token is in the window from token `first`, its column, its block's bit)."""
        warp = self.warp
        column = token - first
        inside = (column // matrix.columns) == 0  # as unsigned numbers
        bit = warp.constant(1) << ((column // COLUMNS) & (matrix.window - 1))
        # Lanes whose rows begin in the same bank have columns of their own.
        outside = ((warp.lane >> 2) & (PADDING - 1)) + matrix.columns
        return (
            inside,
            warp.select(inside, column, outside),
            warp.select(inside, bit, warp.constant(0)),
        )

    def copy_blocks(self, values, window, bits, stage, matrix: Matrix):
        """Begins to copy the channels of a window's touched blocks to `stage`, of this warp.

        Rows beyond the last token are the last one's.
        """
        warp, image = self.warp, self.image
        pieces = COLUMNS * image.chunks

        def copy(block, _):
            first = window * matrix.columns + block * COLUMNS
            start = stage + block * (COLUMNS * image.pitch)
            for step in range(-(-pieces // LANES)):
                piece = warp.lane + step * LANES
                row, chunk = piece // image.chunks, piece % image.chunks
                warp.copy_to_shared(
                    start + row * image.pitch + chunk * CHUNK_BYTES,
                    values,
                    self.channel(self.inside(first + row)) + chunk * CHUNK,
                    mask=piece < pieces,
                )

        for_each_bit(warp, bits, matrix.window, copy)

    def bits(self, tokens, first, matrix: Matrix):
        """Bits of a window's blocks that the lane's tokens are in."""
        return functools.reduce(
            lambda bits, token: bits | self.place(token, first, matrix)[2],
            tokens,
            self.warp.constant(0),
        )

    def add(self, tokens, weights, first, matrix: Matrix, scratch) -> None:
        """Adds a point's weights to the lane's row of the window from token `first`."""
        warp = self.warp
        row = scratch + warp.lane * matrix.pitch
        places = [row + self.place(token, first, matrix)[1] * WORD for token in tokens]
        old = [warp.load_shared(place) for place in places]
        for place, x, weight in zip(places, old, weights, strict=True):
            warp.store_shared(place, x + weight)

    def clear_blocks(self, bits, matrix: Matrix, scratch) -> None:
        """Zeros the blocks of the warp's matrix that have a bit."""
        warp = self.warp
        eighth = warp.lane >> 2  # rows two apart are 16 banks apart
        row = (eighth & 4) | ((eighth & 1) << 1) | ((eighth >> 1) & 1)
        start = scratch + row * matrix.pitch + self.column * (4 * WORD)

        def clear(block, _):
            for i in range(QUERIES // 8):
                place = start + block * (COLUMNS * WORD) + i * 8 * matrix.pitch
                warp.store_shared(place, *[warp.constant(0.0)] * 4)

        for_each_bit(warp, bits, matrix.window, clear)

    def columns_of_rows(self, address, chunks) -> list:
        """Of 16 rows of channels one or two chunks, transposed, as right sides of a product.

        `address` is each lane's row and chunk, see `right_rows`.
        """
        return self.warp.load_matrices(
            address, offset=CHUNK_BYTES * chunks[0], count=2 * len(chunks), transposed=True
        )


def has_bit(bits, n):
    return ((bits >> n) & 1) == 1


def for_each_bit(warp: Warp, bits, count: int, visit: Callable, carry=()):
    """The last of carry = visit(n, carry) for the bits below `count` that are set, on all lanes."""

    def visit_if_set(n, carry):
        return warp.when(has_bit(bits, n), lambda carry: visit(n, carry), carry)

    return warp.loop(count, visit_if_set, carry)


def for_each_tile(
    warp: Warp, rows: PointRows, tile: Callable, scratch, *, part=0, parts: int = 1, ready: Callable
):
    """Calls tile(number, words of the points) for each tile of 32 queries of one of `parts` parts.

    Warps take turns. Points are loaded one tile ahead; ready() is called after the first load.
    """
    tiles = -(-rows.image.tokens // QUERIES)
    workers = warp.num_warps * parts
    first = warp.warp + part * warp.num_warps
    last = warp.constant(tiles - 1)
    loaded = rows.load(warp.select(first < tiles, first, last))
    ready()

    def step(i, loaded):
        number = i * workers + first

        def visit(loaded):
            words = rows.exchange(loaded, scratch)
            following = number + workers
            loaded = warp.when(following < tiles, lambda _: rows.load(following), loaded)
            tile(number, words)
            return loaded

        return warp.when(number < tiles, visit, loaded) if tiles % workers else visit(loaded)

    warp.loop(-(-tiles // workers), step, loaded)


# --- arithmetic of one lane's point, in JAX -------------------------------------------------------


def _position(points: Points, query_x, query_y):
    point = points.point(lambda field, k, *index: field[index[0]] if index else field, 0)
    return *discard_non_finite(point.dx + query_x, point.dy + query_y), point.weight


def _corners(position, *, image: Image):
    """(tokens of the four corners, their weights), row by row."""
    x, y, point_weight = position
    columns, rows = corners(x, image.w, image.boundary), corners(y, image.h, image.boundary)
    tokens, weights = [], []
    for j in range(2):
        row = rows.token[j] * image.w
        share = rows.weight[j] * point_weight
        for i in range(2):
            tokens.append(row + columns.token[i])
            weights.append(share * columns.weight[i])
    return tokens, weights


def _tokens_inside(points: Points, query_x, query_y, *, image: Image):
    _, columns, rows = located(points, query_x, query_y, image)
    return [rows.index[j] * image.w + columns.index[i] for j in range(2) for i in range(2)]
