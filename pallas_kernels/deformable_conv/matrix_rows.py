"""What a warp of `sparse_matrix.py`'s kernels has: 32 queries, their sampling points, their matrix.

Lanes' values are `warp.Lanes`; the arithmetic of a lane's own sampling point is JAX's.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.deformable_conv.image_block import CHUNK, CHUNK_BYTES, Image, located
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

QUERIES = LANES  # that a warp takes at a time
COLUMNS = 16  # tokens of a block of the matrix: of one product
WORD = 4  # bytes
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

    The columns beyond the window are where entries go that are not in it. Their number makes
    neighbouring rows begin in different banks, as a product's loads need it.
    """

    window: int  # blocks of columns; a power of two
    padding: int  # columns

    @property
    def columns(self) -> int:
        return self.window * COLUMNS

    @property
    def pitch(self) -> int:
        return WORD * (self.columns + self.padding)

    @property
    def bytes(self) -> int:
        return QUERIES * self.pitch


class Queries(NamedTuple):
    """The queries of a warp, one a lane. Beyond the last one, it is the last."""

    first: object
    token: object
    exists: object
    x: object  # float32
    y: object


class Group:
    """One group of one image, as one warp of a block sees it."""

    def __init__(self, warp: Warp, image: Image, number, shared, points: Points):
        self.warp, self.image, self.points = warp, image, points
        self.group = number % image.groups
        self._first = (number // image.groups) * (image.tokens * image.groups) + self.group
        self.shared = shared
        # Of a matrix of a product, a lane holds two neighbours in this row and 8 rows below it.
        self.row = warp.lane >> 2
        self.column = warp.lane & 3  # of pairs of columns
        chunks = range(image.chunks)
        self.chunk_pairs = [chunks[n : n + 2] for n in chunks[::2]]  # the last one may be alone
        self._per_group = [warp.load(ref, self.group) for ref in points.per_group]

    def entry(self, token):
        """Number of the token's entry for this group, in arrays [B, tokens, G, ...]."""
        return self._first + token * self.image.groups

    def channel(self, token):
        """Number of the token's first channel, in arrays [B, tokens, G, C]."""
        return self.entry(token) * self.image.channels

    def inside(self, token):
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
        exists = token < image.tokens
        token = self.inside(token)
        x, y = warp.apply(
            lambda x, y: (x.astype(jnp.float32), y.astype(jnp.float32)),
            token % image.w,
            token // image.w,
        )
        return Queries(first, token, exists, x, y)

    # --- sampling points: neighbouring lanes load neighbours, and exchange them -------------------

    def _elements(self, queries: Queries):
        """(where in arrays [B, tokens, G, K], row, k, whether it is there) for each step."""
        warp, num_points = self.warp, self.image.num_points
        for step in range(num_points):
            element = warp.lane + step * LANES
            row, k = element // num_points, element % num_points
            token = queries.first + row
            exists = token < self.image.tokens
            yield self.entry(self.inside(token)) * num_points + k, row, k, exists

    def _fields(self):
        """(which of points.per_query, its first word in a row, words an entry) of each, and all."""
        rank, words, fields = self.warp.rank(self.points.weights), 0, []
        for number, ref in enumerate(self.points.per_query):
            count = 1 if self.warp.rank(ref) == rank else 2
            fields.append((number, words, count))
            words += count * self.image.num_points
        return fields, words

    def _row_bytes(self, words: int) -> int:
        return WORD * (words | 1)  # odd: a column's words are in different banks

    def load_points(self, queries: Queries, scratch) -> list[Points]:
        """The fields of the lane's query, for each point; `scratch` is left as zeros."""
        warp, num_points = self.warp, self.image.num_points
        fields, words = self._fields()
        pitch = self._row_bytes(words)
        loaded = []
        for index, row, k, _ in self._elements(queries):
            for number, first, count in fields:
                numbers = warp.load(self.points.per_query[number], index * count, count)
                numbers = numbers if count == 2 else (numbers,)
                loaded.append((scratch + row * pitch + (k * count + first) * WORD, numbers))
        for address, numbers in loaded:
            for i, number in enumerate(numbers):
                warp.store_shared(address + i * WORD, number)
        warp.wait_for_lanes()

        def word(n):
            return warp.load_shared(scratch + warp.lane * pitch + n * WORD)

        points = []
        for k in range(num_points):
            per_query = [
                tuple(word(first + 2 * k + i) for i in range(2)) if count == 2 else word(first + k)
                for _, first, count in fields
            ]
            points.append(type(self.points)(*per_query, *self._per_group, *self._constants(k)))
        warp.wait_for_lanes()
        self.clear(scratch, QUERIES * pitch)
        warp.wait_for_lanes()
        return points

    def _constants(self, k: int) -> list:
        warp = self.warp
        constants = []
        for ref in self.points.constant:
            if warp.rank(ref) == 1:
                constants.append(warp.load(ref, warp.constant(0), 2))
            else:  # [K, 2]
                x, y = warp.load(ref, warp.constant(2 * k), 2)
                constants.append({(0, 0): x, (0, 1): y})
        return constants

    def store_gradients(self, refs, queries: Queries, gradients: list, scratch):
        """Writes, for each point, the gradients of the lane's per-query fields."""
        warp = self.warp
        fields, words = self._fields()
        pitch = self._row_bytes(words)
        warp.wait_for_lanes()
        for k, gradient in enumerate(gradients):
            for number, first, count in fields:
                numbers = gradient[number] if count == 2 else (gradient[number],)
                for i, x in enumerate(numbers):
                    place = (k * count + first + i) * WORD
                    warp.store_shared(scratch + warp.lane * pitch + place, x)
        warp.wait_for_lanes()
        for index, row, k, exists in self._elements(queries):
            for number, first, count in fields:
                place = scratch + row * pitch + (k * count + first) * WORD
                numbers = [warp.load_shared(place + i * WORD) for i in range(count)]
                warp.store(refs[number], index * count, *numbers, mask=exists)
        warp.wait_for_lanes()

    def corners(self, points: list[Points], queries: Queries) -> list:
        """([tokens of the four corners], [their weights]) of each point."""
        return [
            self.warp.apply(functools.partial(_corners, image=self.image), p, queries.x, queries.y)
            for p in points
        ]

    # --- the matrix -----------------------------------------------------------------------------

    def windows(self, tokens, matrix: Matrix):
        """Bits of the windows (modulo 32) that the queries' tokens are in, of all lanes."""
        warp = self.warp
        one = warp.constant(1)
        bits = [one << ((token // matrix.columns) & 31) for token in tokens]
        return warp.union(functools.reduce(lambda a, b: a | b, bits))

    def place(self, token, first, matrix: Matrix):
        """(the column of a token in the window from token `first`, the bit of its block)."""
        warp = self.warp
        column = token - first
        inside = (column // matrix.columns) == 0  # as unsigned numbers
        bit = warp.constant(1) << ((column // COLUMNS) & (matrix.window - 1))
        outside = warp.constant(matrix.columns)
        return (
            inside,
            warp.select(inside, column, outside),
            warp.select(inside, bit, warp.constant(0)),
        )

    def touched_blocks(self, all_tokens, windows, window, matrix: Matrix):
        """Bits of a window's blocks that any of the queries' tokens are in."""
        warp = self.warp
        first = window * matrix.columns
        bits = warp.constant(0)
        for tokens, touched in zip(all_tokens, windows, strict=True):

            def add(bits, tokens=tokens):
                return functools.reduce(
                    lambda bits, token: bits | self.place(token, first, matrix)[2], tokens, bits
                )

            bits = warp.when(has_bit(touched, window & 31), add, bits)
        return warp.union(bits)

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

        def copy_if_touched(block, _):
            warp.when(has_bit(bits, block), lambda _: copy(block, _))

        warp.loop(matrix.window, copy_if_touched)

    def scatter(self, corners, windows, window, matrix: Matrix, scratch):
        """Adds the weights of all corners in a window to the matrix; bits of touched blocks."""
        warp = self.warp
        first = window * matrix.columns
        row = scratch + warp.lane * matrix.pitch
        bits = warp.constant(0)
        for (tokens, weights), touched in zip(corners, windows, strict=True):

            def add(bits, tokens=tokens, weights=weights):
                places = []
                for token in tokens:
                    _, column, bit = self.place(token, first, matrix)
                    places.append(row + column * WORD)
                    bits = bits | bit
                old = [warp.load_shared(place) for place in places]
                for place, x, weight in zip(places, old, weights, strict=True):
                    warp.store_shared(place, x + weight)
                return bits

            bits = warp.when(has_bit(touched, window & 31), add, bits)
        warp.wait_for_lanes()
        return warp.union(bits)

    def columns_of_rows(self, address, chunks) -> list:
        """Of 16 rows of channels one or two chunks, transposed, as right sides of a product.

        `address` is each lane's row and chunk, see `right_rows`.
        """
        return self.warp.load_matrices(
            address, offset=CHUNK_BYTES * chunks[0], count=2 * len(chunks), transposed=True
        )


def has_bit(bits, n):
    return ((bits >> n) & 1) == 1


def without_zeros(warp: Warp, tokens, weights):
    """Corners with a weight of 0 are moved to where nothing is.

    A corner outside the image was moved inside, possibly onto another one of the same point, which
    may not be stored to twice.
    """
    nowhere = warp.constant(NOWHERE)
    tokens = [
        warp.select(weight == 0, nowhere, token)
        for token, weight in zip(tokens, weights, strict=True)
    ]
    return tokens, weights


def for_each_tile(warp: Warp, image: Image, tile: Callable, *, part=0, parts: int = 1):
    """Calls tile(number) for each tile of 32 queries of one of `parts` parts; warps take turns."""
    tiles = -(-image.tokens // QUERIES)
    workers = warp.num_warps * parts
    first = warp.warp + part * warp.num_warps

    def step(i, _):
        number = i * workers + first
        if tiles % workers:
            warp.when(number < tiles, lambda _: tile(number))
        else:
            tile(number)

    warp.loop(-(-tiles // workers), step)


# --- arithmetic of one lane's point, in JAX -------------------------------------------------------


def _corners(points: Points, query_x, query_y, *, image: Image):
    """(tokens of the four corners, their weights), row by row."""
    point, columns, rows = located(points, query_x, query_y, image)
    tokens, weights = [], []
    for j in range(2):
        row = rows.index[j] * image.w
        share = rows.weight[j] * point.weight
        for i in range(2):
            tokens.append(row + columns.index[i])
            weights.append(share * columns.weight[i])
    return tokens, weights
