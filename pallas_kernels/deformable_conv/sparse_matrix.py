"""Kernels that build the interpolation matrix in shared memory, for NVIDIA's Hopper.

The forward is A values, with a row of A for each query and a column for each token; a row has at
most four entries a sampling point. A warp takes 32 queries, one a lane. Each lane adds the weights
of its query's sampling points to its own row of A, in float32, entry by entry: the work does not
grow with the image, and nothing is shared between lanes, so every run gives the same bits. Blocks
of 16 columns that were touched then go through the tensor cores. A window of columns is in shared
memory at a time, the values of a group's image all the time.

The gradients of the points look up entries of d out valuesᵀ, of which the touched blocks are
computed. The gradient of the values is Aᵀ d out: there a block has a window of tokens, and visits
all queries that touch it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.deformable_conv.interpolation import BASES, corners, discard_non_finite
from pallas_kernels.deformable_conv.limits import check_indexable
from pallas_kernels.deformable_conv.points import Multiscale, Points
from pallas_kernels.deformable_conv.simulated_warp import SimulatedWarp
from pallas_kernels.deformable_conv.warp import LANES, Warp

MAX_SHARED_BYTES = 226 * 1024  # that a block may have, less what Mosaic takes
WARPS_OF_A_GROUP = 4  # Mosaic's unit of threads
QUERIES = LANES  # that a warp takes at a time
COLUMNS = 16  # tokens of a block of the matrix: of one product
CHUNK = 8  # channels of one row of a matrix of ldmatrix
CHUNK_BYTES = 16
WORD = 4  # bytes
MAX_POINTS = 9  # whose corners fit into registers
MAX_CHANNELS = 80  # whose sums do


class Image(NamedTuple):
    """The sizes of a call, all static."""

    groups: int
    h: int
    w: int
    channels: int
    num_points: int
    dtype: np.dtype
    boundary: str

    @property
    def tokens(self) -> int:
        return self.h * self.w

    @property
    def blocks(self) -> int:
        """Of the matrix' columns."""
        return -(-self.tokens // COLUMNS)

    @property
    def chunks(self) -> int:
        return self.channels // CHUNK

    @property
    def pitch(self) -> int:
        """Bytes between rows of channels in shared memory.

        An odd number of chunks, so that rows of neighbouring tokens begin in different banks.
        """
        return CHUNK_BYTES * (self.chunks + 1 - self.chunks % 2)

    @property
    def bytes(self) -> int:
        return self.blocks * COLUMNS * self.pitch


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


def why_not(h: int, w: int, channels: int, num_points: int, dtype) -> str | None:
    """Why the kernels can't take such values and points; None if they can."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"the values are {jnp.dtype(dtype).name}; expected bfloat16 or float16"
    if channels % CHUNK or channels > MAX_CHANNELS:
        return f"there are {channels} channels; expected a multiple of {CHUNK} to {MAX_CHANNELS}"
    if num_points > MAX_POINTS:
        return f"there are {num_points} points; expected at most {MAX_POINTS}"
    return None


def image_fits(h: int, w: int, channels: int, *, window: int, num_warps: int) -> bool:
    """Whether a group's image fits into shared memory beside the warps' matrices."""
    image = Image(1, h, w, channels, 1, np.dtype(np.float16), "zeros")
    return image.bytes + num_warps * Matrix(window, COLUMNS).bytes <= MAX_SHARED_BYTES


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
        if first < image.bytes:
            self.clear(self.shared + first, image.bytes - first)

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

    # --- sampling points: neighbouring lanes load neighbours, and exchange them in shared memory ---

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


# --- kernels -------------------------------------------------------------------------------------


def _forward_kernel(
    warp: Warp, points: Points, shared, values, out, *, image: Image, matrix: Matrix
):
    group = Group(warp, image, warp.block, shared, points)
    group.copy_image(values)
    scratch = shared + image.bytes + warp.warp * matrix.bytes
    group.clear(scratch, matrix.bytes)
    warp.wait_for_copies()
    # Columns 4 j to 4 j + 3 of a block are entries 2 j, 2 j + 1, 8 + 2 j, 9 + 2 j of a product's
    # sum, so that a lane's four lie side by side.
    in_matrix, matrix_number = warp.lane & 7, warp.lane >> 3
    token = (in_matrix >> 1) * 4 + (in_matrix & 1) + (matrix_number & 1) * 2
    rows = shared + token * image.pitch + (matrix_number >> 1) * CHUNK_BYTES

    def tile(number):
        queries = group.queries(number)
        corners = group.corners(group.load_points(queries, scratch), queries)
        windows = [group.windows(tokens, matrix) for tokens, _ in corners]
        corners = [without_zeros(warp, *both, image) for both in corners]
        any_window = functools.reduce(lambda a, b: a | b, windows)

        def add_window(window, totals):
            def add(totals):
                bits = group.scatter(corners, windows, window, matrix, scratch)

                def add_block(block, totals):
                    return warp.when(
                        has_bit(bits, block),
                        lambda totals: multiply(window * matrix.window + block, block, totals),
                        totals,
                    )

                totals = warp.loop(matrix.window, add_block, totals)
                warp.wait_for_lanes()
                return totals

            return warp.when(has_bit(any_window, window & 31), add, totals)

        def multiply(block_of_image, block, totals):
            place = scratch + group.row * matrix.pitch + (block * COLUMNS + group.column * 4) * WORD
            left = []
            for half in range(2):
                quads = [place + (half * 16 + i * 8) * matrix.pitch for i in range(2)]
                entries = [warp.load_shared(x, 4) for x in quads]
                for x in quads:
                    warp.store_shared(x, *[warp.constant(0.0)] * 4)
                left.append(
                    [warp.pack(*e[2 * i : 2 * i + 2], image.dtype) for i in range(2) for e in entries]
                )
            totals = list(totals)
            address = rows + block_of_image * (COLUMNS * image.pitch)
            for chunks in group.chunk_pairs:
                right = group.columns_of_rows(address, chunks)
                for i, chunk in enumerate(chunks):
                    for half in range(2):
                        n = 2 * chunk + half
                        totals[n] = warp.add_product(
                            totals[n], left[half], right[2 * i : 2 * i + 2], image.dtype
                        )
            return totals

        zeros = [[warp.constant(0.0)] * 4 for _ in range(2 * image.chunks)]
        num_windows = -(-image.blocks // matrix.window)
        totals = warp.loop(num_windows, add_window, zeros)
        for n, total in enumerate(totals):
            chunk, half = divmod(n, 2)
            for i in range(2):
                query = queries.first + group.row + (16 * half + 8 * i)
                index = group.channel(query) + group.column * 2 + CHUNK * chunk
                pair = warp.pack(total[2 * i], total[2 * i + 1], image.dtype)
                warp.store_pair(out, index, pair, mask=query < image.tokens)

    for_each_tile(warp, image, tile)


def _point_gradients_kernel(
    warp: Warp, points: Points, shared, values, d_out, *gradients, image: Image, matrix: Matrix
):
    group = Group(warp, image, warp.block, shared, points)
    group.copy_image(values)
    scratch = shared + image.bytes + warp.warp * matrix.bytes
    warp.wait_for_copies()
    # As in the forward, four columns of a block are side by side in a lane.
    in_matrix, matrix_number = warp.lane & 7, warp.lane >> 3
    token = (in_matrix >> 1) * 4 + (in_matrix & 1)
    pair_rows = shared + (token + (matrix_number >> 1) * 2) * image.pitch
    pair_rows = pair_rows + (matrix_number & 1) * CHUNK_BYTES
    last_rows = shared + (token + (matrix_number & 1) * 2) * image.pitch

    def tile(number):
        queries = group.queries(number)
        loaded = group.load_points(queries, scratch)
        all_tokens = [tokens for tokens, _ in group.corners(loaded, queries)]
        windows = [group.windows(tokens, matrix) for tokens in all_tokens]
        any_window = functools.reduce(lambda a, b: a | b, windows)
        d_rows = []  # left sides, by halves of the queries and pairs of chunks
        for half in range(2):
            starts = [
                group.channel(group.inside(queries.first + group.row + (16 * half + 8 * i)))
                + group.column * 2
                for i in range(2)
            ]
            d_rows.append(
                [
                    [warp.load_pair(d_out, start + CHUNK * c) for c in chunks for start in starts]
                    for chunks in group.chunk_pairs
                ]
            )

        def multiply(block_of_image, block):
            moved = block_of_image * (COLUMNS * image.pitch)
            zero = warp.constant(0.0)
            totals = [[[zero] * 4 for _ in range(2)] for _ in range(2)]
            for n, chunks in enumerate(group.chunk_pairs):
                rows = (pair_rows if len(chunks) == 2 else last_rows) + moved
                right = warp.load_matrices(
                    rows, offset=CHUNK_BYTES * chunks[0], count=2 * len(chunks), transposed=False
                )
                size = len(chunks)
                for half in range(2):
                    for part in range(2):
                        totals[half][part] = warp.add_product(
                            totals[half][part],
                            d_rows[half][n],
                            right[part * size : (part + 1) * size],
                            image.dtype,
                        )
            place = scratch + group.row * matrix.pitch + (block * COLUMNS + group.column * 4) * WORD
            for half in range(2):
                for i in range(2):
                    numbers = [totals[half][part][2 * i + j] for part in range(2) for j in range(2)]
                    warp.store_shared(place + (half * 16 + i * 8) * matrix.pitch, *numbers)

        def visit_window(window, products):
            first = window * matrix.columns

            def visit(products):
                bits = warp.constant(0)
                for tokens in all_tokens:
                    for token in tokens:
                        bits = bits | group.place(token, first, matrix)[2]
                bits = warp.union(bits)

                def add_block(block, _):
                    warp.when(
                        has_bit(bits, block),
                        lambda _: multiply(window * matrix.window + block, block),
                    )

                warp.loop(matrix.window, add_block)
                warp.wait_for_lanes()
                row = scratch + warp.lane * matrix.pitch
                found = []
                for tokens, olds, touched in zip(all_tokens, products, windows, strict=True):

                    def look_up(olds, tokens=tokens):
                        news = []
                        for token, old in zip(tokens, olds, strict=True):
                            inside, column, _ = group.place(token, first, matrix)
                            new = warp.load_shared(row + column * WORD)
                            news.append(warp.select(inside, new, old))
                        return news

                    found.append(warp.when(has_bit(touched, window & 31), look_up, olds))
                warp.wait_for_lanes()
                return found

            return warp.when(has_bit(any_window, window & 31), visit, products)

        zeros = [[warp.constant(0.0)] * 4 for _ in all_tokens]
        products = warp.loop(-(-image.blocks // matrix.window), visit_window, zeros)
        pulled = [
            warp.apply(
                functools.partial(_gradients_of_point, image=image), p, queries.x, queries.y, found
            )
            for p, found in zip(loaded, products, strict=True)
        ]
        group.store_gradients(gradients, queries, pulled, scratch)

    for_each_tile(warp, image, tile)


def _values_gradient_kernel(
    warp: Warp, points: Points, shared, d_out, touched, d_values, *, image: Image, matrix: Matrix
):
    num_windows = -(-image.blocks // matrix.window)
    window = warp.block % num_windows
    group = Group(warp, image, warp.block // num_windows, shared, points)
    first = window * matrix.columns
    own_blocks = matrix.window // warp.num_warps
    rows_bytes = QUERIES * image.pitch
    all_rows = shared + warp.num_warps * matrix.bytes
    all_bits = all_rows + warp.num_warps * rows_bytes
    scratch = shared + warp.warp * matrix.bytes
    rows = all_rows + warp.warp * rows_bytes
    group.clear(scratch, matrix.bytes)
    num_tiles = -(-image.tokens // QUERIES)
    # Queries j and j + 4 are entries 2 j and 2 j + 1 of a product's sum, so that a load's rows of
    # the matrix begin in different banks.
    in_matrix, matrix_number = warp.lane & 7, warp.lane >> 3
    query = (in_matrix >> 1) + (in_matrix & 1) * 4 + (matrix_number & 1) * 8
    right_rows = all_rows + query * image.pitch + (matrix_number >> 1) * CHUNK_BYTES
    place = shared + group.column * matrix.pitch
    place = place + (warp.warp * (own_blocks * COLUMNS) + group.row) * WORD

    def copy_rows(queries: Queries):
        pieces = QUERIES * image.chunks
        for step in range(-(-pieces // LANES)):
            piece = warp.lane + step * LANES
            row, chunk = piece // image.chunks, piece % image.chunks
            warp.copy_to_shared(
                rows + row * image.pitch + chunk * CHUNK_BYTES,
                d_out,
                group.channel(group.inside(queries.first + row)) + chunk * CHUNK,
                mask=None,
            )

    def multiply(slot: int, totals):
        totals = [list(x) for x in totals]
        for half in range(2):
            right = []
            for chunks in group.chunk_pairs:
                address = right_rows + (slot * rows_bytes + half * 16 * image.pitch)
                right += group.columns_of_rows(address, chunks)
            for block in range(own_blocks):
                entries = [
                    [
                        warp.load_shared(
                            place
                            + (
                                slot * matrix.bytes
                                + (half * 16 + q) * matrix.pitch
                                + (block * COLUMNS + t) * WORD
                            )
                        )
                        for q in (0, 4, 8, 12)
                    ]
                    for t in (0, 8)
                ]
                left = [warp.pack(*e[i : i + 2], image.dtype) for i in (0, 2) for e in entries]
                for chunk in range(image.chunks):
                    totals[block][chunk] = warp.add_product(
                        totals[block][chunk], left, right[2 * chunk : 2 * chunk + 2], image.dtype
                    )
        return totals

    def visit_tiles(step, carry):
        word, base, totals = carry
        number = warp.nth_bit(word, step * warp.num_warps + warp.warp)
        tile = warp.select(number < 0, warp.constant(0), base + number)
        queries = group.queries(tile)
        copy_rows(queries)
        corners = group.corners(group.load_points(queries, scratch), queries)
        windows = [group.windows(tokens, matrix) for tokens, _ in corners]
        corners = [without_zeros(warp, *both, image) for both in corners]
        nowhere = warp.constant(image.blocks * COLUMNS * 2)
        corners = [
            (
                [
                    warp.select(number < 0, nowhere, warp.select(queries.exists, t, nowhere))
                    for t in tokens
                ],
                weights,
            )
            for tokens, weights in corners
        ]
        bits = group.scatter(corners, windows, window, matrix, scratch)
        warp.store_shared(all_bits + warp.warp * WORD, bits)
        warp.wait_for_copies()
        for slot in range(warp.num_warps):
            bits = warp.load_shared_bits(all_bits + slot * WORD)
            own = (bits >> (warp.warp * own_blocks)) & (2**own_blocks - 1)
            totals = warp.when(
                warp.constant(0) < own, functools.partial(multiply, slot), totals
            )
        warp.wait_for_block()
        group.clear(scratch, matrix.bytes)
        warp.wait_for_lanes()
        return word, base, totals

    def visit_tiles_of_word(number, totals):
        base = number * LANES
        tile = base + warp.lane
        tile = warp.select(tile < num_tiles, tile, warp.constant(num_tiles - 1))
        index = (warp.block // num_windows) * num_tiles + tile
        touches = has_bit(warp.load_bits(touched, index), window & 31)
        word = warp.ballot(touches)
        if num_tiles % LANES:
            left = warp.constant(num_tiles) - base
            full = warp.constant(-1)
            some = warp.select(left < LANES, (warp.constant(1) << (left & 31)) - 1, full)
            word = word & some
        count = (warp.popcount(word) + (warp.num_warps - 1)) // warp.num_warps
        return warp.loop(count, visit_tiles, (word, base, totals))[2]

    zero = warp.constant(0.0)
    zeros = [[[zero] * 4 for _ in range(image.chunks)] for _ in range(own_blocks)]
    totals = warp.loop(-(-num_tiles // LANES), visit_tiles_of_word, zeros)
    for block in range(own_blocks):
        for chunk in range(image.chunks):
            for i in range(2):
                token = (warp.warp * own_blocks + block) * COLUMNS + group.row + (8 * i)
                token = token + first
                index = group.channel(token) + group.column * 2 + CHUNK * chunk
                pair = totals[block][chunk][2 * i : 2 * i + 2]
                pair = warp.pack(*pair, image.dtype)
                warp.store_pair(d_values, index, pair, mask=token < image.tokens)


def without_zeros(warp: Warp, tokens, weights, image: Image):
    """Corners with a weight of 0 are moved to where nothing is.

    A corner outside the image was moved inside, possibly onto another one of the same point, which
    may not be stored to twice.
    """
    nowhere = warp.constant(image.blocks * COLUMNS * 2)
    tokens = [
        warp.select(weight == 0, nowhere, token)
        for token, weight in zip(tokens, weights, strict=True)
    ]
    return tokens, weights


def for_each_tile(warp: Warp, image: Image, tile: Callable):
    tiles = -(-image.tokens // QUERIES)
    steps = -(-tiles // warp.num_warps)

    def step(i, _):
        number = i * warp.num_warps + warp.warp
        if tiles % warp.num_warps:
            warp.when(number < tiles, lambda _: tile(number))
        else:
            tile(number)

    warp.loop(steps, step)


# --- arithmetic of one lane's point, in JAX -------------------------------------------------------


def _read(field, k, *index):
    """An entry of a per-query field, of which a lane holds only its own point's."""
    del k
    return field[index[0]] if index else field


def _located(points: Points, query_x, query_y, image: Image):
    point = points.point(_read, 0)
    x, y = discard_non_finite(point.dx + query_x, point.dy + query_y)
    return point, corners(x, image.w, image.boundary), corners(y, image.h, image.boundary)


def _corners(points: Points, query_x, query_y, *, image: Image):
    """(tokens of the four corners, their weights), row by row."""
    point, columns, rows = _located(points, query_x, query_y, image)
    tokens, weights = [], []
    for j in range(2):
        row = rows.index[j] * image.w
        share = rows.weight[j] * point.weight
        for i in range(2):
            tokens.append(row + columns.index[i])
            weights.append(share * columns.weight[i])
    return tokens, weights


def _gradients_of_point(points: Points, query_x, query_y, products, *, image: Image):
    """The gradients of the point's fields from d out . v of its four corners."""
    point, columns, rows = _located(points, query_x, query_y, image)
    d_dx = d_dy = d_weight = 0.0
    for n, product in enumerate(products):
        j, i = divmod(n, 2)
        d_weight += rows.weight[j] * columns.weight[i] * product
        d_dx += rows.weight[j] * columns.slope[i] * product
        d_dy += rows.slope[j] * columns.weight[i] * product
    return point.pull_back(point.weight * d_dx, point.weight * d_dy, d_weight)


def touched_windows(points: Points, *, h: int, w: int, boundary: str, window: int) -> jax.Array:
    """Bits of the windows (modulo 32) that 32 queries may touch; int32 [B, G, tiles].

    Coordinates may be rounded otherwise here than in the kernels, hence a margin.
    """
    offsets = (points.to_offsets() if isinstance(points, Multiscale) else points).offsets
    batch, tokens, groups = offsets.shape[:3]
    query = jnp.arange(tokens)
    x = offsets[..., 0].astype(jnp.float32) + (query % w).astype(jnp.float32)[:, None, None]
    y = offsets[..., 1].astype(jnp.float32) + (query // w).astype(jnp.float32)[:, None, None]
    x, y = discard_non_finite(x, y)
    base = BASES[boundary]

    def ends(x, size):
        margin = 1e-3
        low, high = jnp.clip(jnp.stack([base(x - margin), base(x + margin) + 1]), -1, size)
        clipped = (jnp.clip(i, 0, size - 1).astype(jnp.int32) for i in (low, high))
        return tuple(clipped)

    bits = 0
    for row in ends(y, h):
        for column in ends(x, w):
            number = (row * w + column) // (window * COLUMNS)
            bits = bits | jnp.left_shift(jnp.int32(1), number & 31)
    tiles = -(-tokens // QUERIES)
    bits = jnp.pad(bits, ((0, 0), (0, tiles * QUERIES - tokens), (0, 0), (0, 0)))
    bits = bits.reshape(batch, tiles, QUERIES, groups, -1)
    bits = jax.lax.reduce(bits, jnp.int32(0), jax.lax.bitwise_or, (2, 4))
    return bits.swapaxes(1, 2)


# --- launching -----------------------------------------------------------------------------------


def forward(
    values, points, *, h: int, w: int, boundary: str, window: int, num_warps: int, interpret: bool
):
    """out [B, tokens, G, C] of values [B, tokens, G, C] and points with flattened tokens."""
    image = _image(values, points, h, w, boundary)
    matrix = Matrix(window, padding=COLUMNS)
    (out,) = _launch(
        functools.partial(_forward_kernel, image=image, matrix=matrix),
        name="deformable_forward_sparse_matrix",
        blocks=values.shape[0] * image.groups,
        shared_bytes=image.bytes + num_warps * matrix.bytes,
        points=points,
        others=(values,),
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
    window: int,
    num_warps: int,
    interpret: bool,
) -> list[jax.Array]:
    """The gradients of points.per_query, in `dtypes`; values and d_out are [B, tokens, G, C]."""
    image = _image(values, points, h, w, boundary)
    matrix = Matrix(window, padding=COLUMNS)
    return _launch(
        functools.partial(_point_gradients_kernel, image=image, matrix=matrix),
        name="deformable_point_gradients_sparse_matrix",
        blocks=values.shape[0] * image.groups,
        shared_bytes=image.bytes + num_warps * matrix.bytes,
        points=points,
        others=(values, d_out),
        outputs=tuple(
            jax.ShapeDtypeStruct(x.shape, dtype)
            for x, dtype in zip(points.per_query, dtypes, strict=True)
        ),
        num_warps=num_warps,
        interpret=interpret,
    )


def values_gradient(
    points, d_out, *, h: int, w: int, boundary: str, window: int, num_warps: int, interpret: bool
):
    """The gradient of the values, like d_out [B, tokens, G, C]."""
    image = _image(d_out, points, h, w, boundary)
    matrix = Matrix(window, padding=COLUMNS // 2)
    num_windows = -(-image.blocks // window)
    if num_windows <= 2:
        shape = (d_out.shape[0], image.groups, -(-image.tokens // QUERIES))
        touched = jnp.full(shape, -1, jnp.int32)
    else:
        touched = touched_windows(points, h=h, w=w, boundary=boundary, window=window)
    (d_values,) = _launch(
        functools.partial(_values_gradient_kernel, image=image, matrix=matrix),
        name="deformable_values_gradient_sparse_matrix",
        blocks=d_out.shape[0] * image.groups * num_windows,
        shared_bytes=num_warps * (matrix.bytes + QUERIES * image.pitch + WORD * 4),
        points=points,
        others=(d_out, touched),
        outputs=(jax.ShapeDtypeStruct(d_out.shape, d_out.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return d_values


def _image(values, points: Points, h: int, w: int, boundary: str) -> Image:
    groups, channels = values.shape[2:]
    return Image(groups, h, w, channels, points.weights.shape[-1], values.dtype, boundary)


def _launch(
    kernel: Callable,
    *,
    name: str,
    blocks: int,
    shared_bytes: int,
    points: Points,
    others: tuple[jax.Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    num_warps: int,
    interpret: bool,
) -> list[jax.Array]:
    """Runs kernel(warp, points, address of shared memory, *others, *outputs) on every block."""
    arrays = (*points, *others)
    check_indexable(name, (*arrays, *outputs))

    def run(warp, shared, refs):
        fields, rest = refs[: len(points)], refs[len(points) :]
        kernel(warp, type(points)(*fields), warp.shared_memory(shared), *rest)

    if interpret:

        def simulate(*arrays):
            out = [np.zeros(x.shape, x.dtype) for x in outputs]
            refs = (*map(np.asarray, arrays), *out)
            run(SimulatedWarp(blocks, num_warps, shared_bytes), None, refs)
            return out

        return list(jax.pure_callback(simulate, list(outputs), *arrays, vmap_method="sequential"))

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def inline(context, *refs):
            del context
            *refs, shared = refs
            run(Warp(num_warps), shared, refs)

        inline(*refs)

    body.__name__ = name
    warpgroups = num_warps // WARPS_OF_A_GROUP
    threads = {} if warpgroups == 1 else dict(num_threads=warpgroups, thread_name="warpgroup")
    return plgpu.kernel(
        body,
        out_type=list(outputs),
        scratch_types=[plgpu.SMEM((shared_bytes // 4,), jnp.float32)],
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **threads,
    )(*arrays)
