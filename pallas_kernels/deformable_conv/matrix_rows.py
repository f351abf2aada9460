"""What a warp of `sparse_matrix.py`'s kernels has: 32 queries, their sampling points, their matrix.

Lanes' values are `warp.Lanes`; the arithmetic of a lane's own sampling point is JAX's.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.deformable_conv.group import Extents, Group, Queries
from pallas_kernels.deformable_conv.image import Image, located
from pallas_kernels.deformable_conv.point_rows import QUERIES, WORD
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

CHUNK = 8  # channels of a row of one of ldmatrix' matrices
CHUNK_BYTES = 16
COLUMNS = 16  # tokens of a block of the matrix: of one product
PADDING = 8  # columns of the matrix beyond a window's


class Layout(NamedTuple):
    """A group's image and the warps' parts of the matrix in a block's shared memory."""

    image: Image
    matrix: "Matrix"
    num_warps: int

    @property
    def shared_bytes(self) -> int:
        return image_bytes(self.image) + self.num_warps * self.matrix.bytes

    def scratch(self, shared, warp: Warp):
        """The address of the warp's matrix."""
        return shared + image_bytes(self.image) + warp.warp * self.matrix.bytes


def chunks(image: Image) -> int:
    return image.channels // CHUNK


def pitch(image: Image) -> int:
    """Bytes between rows of values in shared memory.

    An odd number of chunks, so that rows of neighbouring tokens begin in different banks.
    """
    return CHUNK_BYTES * (chunks(image) | 1)


def column_blocks(image: Image) -> int:
    """How many blocks the matrix' columns are in."""
    return -(-image.tokens // COLUMNS)


def image_bytes(image: Image) -> int:
    """Of shared memory, with rows for all columns of the matrix."""
    return column_blocks(image) * COLUMNS * pitch(image)


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


class Corners(NamedTuple):
    """The four tokens around a sampling point. Those outside the image have no weight."""

    token: object  # the first; the next, and the two below; possibly outside
    rows: tuple  # weights of the two rows, times the point's
    columns: tuple


class Window(NamedTuple):
    """A window of the matrix' columns."""

    number: object
    first: object  # token
    size: object  # tokens
    blocks: object  # a bit for each block that is there; None if all are


class MatrixGroup(Group):
    """A group with its part of the matrix."""

    def __init__(self, warp: Warp, image: Image, number, shared, points: Points):
        super().__init__(warp, image, number, points)
        self.shared = shared
        # Of a matrix of a product, a lane holds two neighbours in this row and 8 rows below it.
        self.row = warp.lane >> 2
        self.column = warp.lane & 3  # of pairs of columns
        numbers = range(chunks(image))
        self.chunk_pairs = [numbers[n : n + 2] for n in numbers[::2]]  # the last one may be alone

    def copy_image(self, values):
        """Begins to copy all tokens' channels to shared memory; rows beyond them become zero."""
        warp, image = self.warp, self.image
        pieces = image.tokens * chunks(image)
        threads = warp.num_warps * LANES

        def copy(step, _):
            piece = step * threads + warp.thread
            token, chunk = piece // chunks(image), piece % chunks(image)
            warp.copy_to_shared(
                self.shared + token * pitch(image) + chunk * CHUNK_BYTES,
                values,
                self.channel(token) + chunk * CHUNK,
                mask=None if pieces % threads == 0 else piece < pieces,
            )

        warp.loop(-(-pieces // threads), copy)
        first = image.tokens * pitch(image)
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

    # --- the matrix -----------------------------------------------------------------------------

    def corners(self, fields: Points, queries: Queries) -> "Corners":
        """Of a sampling point of the lane's query."""
        function = functools.partial(_corners, image=self.image)
        return self.warp.apply(function, fields, queries.x, queries.y)

    def for_each_window(self, extents: Extents, matrix: Matrix, visit: Callable, carry):
        """The last of carry = visit(window, carry) for the windows where any corners may be."""
        warp, image = self.warp, self.image

        def ends(extents):
            last = jnp.minimum(extents.highest + image.w + 1, image.tokens - 1)
            return jnp.maximum(extents.lowest, 0), last

        first, last = warp.apply(ends, extents)
        first = first // matrix.columns
        # Divided as an unsigned number, hence the sum.
        after = (last + matrix.columns) // matrix.columns
        return warp.loop(
            after - first, lambda n, carry: visit(self.window(first + n, matrix), carry), carry
        )

    def window(self, number, matrix: Matrix) -> "Window":
        warp = self.warp
        first = number * matrix.columns
        if self.image.tokens % matrix.columns == 0:
            return Window(number, first, warp.constant(matrix.columns), None)
        rest = warp.constant(self.image.tokens) - first
        size = warp.apply(lambda x: jnp.minimum(jnp.maximum(x, 0), matrix.columns), rest)
        blocks = (size + (COLUMNS - 1)) // COLUMNS
        return Window(number, first, size, (warp.constant(1) << blocks) - 1)

    def bits(self, token, window: "Window"):
        """Bits of a window's blocks in which corners from `token` may be.

        Beyond the window's blocks there may be more.
        """
        warp = self.warp
        column = token - window.first
        bits = [warp.bit((column + x) // COLUMNS) for x in self._neighbours]
        bits = (bits[0] | bits[1]) | (bits[2] | bits[3])
        return bits if window.blocks is None else bits & window.blocks

    def add(self, corners: "Corners", window: "Window", matrix: Matrix, scratch) -> None:
        """Adds a point's weights to the lane's row of a window."""
        warp = self.warp
        weights = [x * y for y in corners.rows for x in corners.columns]
        entries = self._entries(corners.token, window, matrix, scratch)
        entries = list(zip(entries, weights, strict=True))
        # In images of one column, the right corner of a row may be the left one of the next.
        at_a_time = 1 if self.image.w == 1 else 4
        for n in range(0, 4, at_a_time):
            some = entries[n : n + at_a_time]
            sums = [
                warp.load_shared_where(inside, place, warp.constant(0.0)) + weight
                for (inside, place), weight in some
            ]
            for ((inside, place), _), total in zip(some, sums, strict=True):
                warp.store_shared_where(inside, place, total)

    def look_up(self, token, otherwise: list, window: "Window", matrix: Matrix, scratch) -> list:
        """The lane's entries at a point's four corners that are in the window."""
        entries = self._entries(token, window, matrix, scratch)
        return [
            self.warp.load_shared_where(inside, place, x)
            for (inside, place), x in zip(entries, otherwise, strict=True)
        ]

    @property
    def _neighbours(self) -> tuple[int, ...]:
        """What is added to a point's first token for its four."""
        return 0, 1, self.image.w, self.image.w + 1

    def _entries(self, token, window: "Window", matrix: Matrix, scratch) -> list:
        """(whether it is in the window, its address) for each corner's entry of the lane's row."""
        column = token - window.first
        first = scratch + self.warp.lane * matrix.pitch + column * WORD
        return [
            (self.warp.below(column + x, window.size), first + x * WORD) for x in self._neighbours
        ]

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

    def columns_of_rows(self, address, pair) -> list:
        """Of 16 rows of channels one or two chunks, transposed, as right sides of a product.

        `address` is each lane's row and chunk, see `right_rows`.
        """
        return self.warp.load_matrices(
            address, offset=CHUNK_BYTES * pair[0], count=2 * len(pair), transposed=True
        )


def has_bit(bits, n):
    return ((bits >> n) & 1) == 1


def for_each_bit(warp: Warp, bits, count: int, visit: Callable, carry=()):
    """The last of carry = visit(n, carry) for the bits below `count` that are set, on all lanes."""

    def visit_if_set(n, carry):
        return warp.when(has_bit(bits, n), lambda carry: visit(n, carry), carry)

    return warp.loop(count, visit_if_set, carry)


# --- arithmetic of one lane's point, in JAX -------------------------------------------------------


def _corners(points: Points, query_x, query_y, *, image: Image) -> Corners:
    point, columns, rows = located(points, query_x, query_y, image)
    shares = [weight * point.weight for weight in rows.weight]
    return Corners(rows.token[0] * image.w + columns.token[0], shares, columns.weight)
