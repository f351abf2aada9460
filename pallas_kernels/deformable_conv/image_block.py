"""What a block of `shared_image.py`'s kernels has: a group's image, its queries, sampling points.

Lanes' values are `warp.Lanes`; the arithmetic of a lane's own sampling point is JAX's.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_conv.interpolation import corners, discard_non_finite
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

QUERIES = 16  # of one matrix product
CHUNK = 8  # channels of one row of a matrix of ldmatrix
CHUNK_BYTES = 16


class Image(NamedTuple):
    """The sizes of a call, all static. A block may have a part of the channels only."""

    groups: int
    h: int
    w: int
    channels: int
    parts: int  # that the channels are in
    num_points: int
    dtype: np.dtype
    boundary: str

    @property
    def tokens(self) -> int:
        return self.h * self.w

    @property
    def chunks(self) -> int:
        """Of a part."""
        return self.channels // CHUNK // self.parts

    @property
    def pitch(self) -> int:
        """Bytes between rows in shared memory.

        An odd number of chunks, so that rows of neighbouring tokens begin in different banks.
        """
        return CHUNK_BYTES * (self.chunks + 1 - self.chunks % 2)

    @property
    def shared_bytes(self) -> int:
        return self.tokens * self.pitch


class Queries(NamedTuple):
    """Sixteen queries; each half of a warp has them all. Beyond the last, it is the last."""

    first: object  # number of the first
    token: object
    x: object  # float32
    y: object
    exists: object  # bool; None if all do


class Block:
    """One group of one image, on one block of threads."""

    def __init__(self, warp: Warp, image: Image, shared):
        self.warp, self.image = warp, image
        self.shared = shared
        number, part = warp.block // image.parts, warp.block % image.parts
        self.group = number % image.groups
        self._first = (number // image.groups) * (image.tokens * image.groups) + self.group
        self._first_channel = part * (image.chunks * CHUNK)
        # Of a matrix of a product, a lane holds two neighbours in this row and 8 rows below it.
        self.row = warp.lane >> 2
        self.column = warp.lane & 3  # of pairs of columns
        chunks = range(image.chunks)
        self.chunk_pairs = [chunks[n : n + 2] for n in chunks[::2]]  # the last one may be alone

    def entry(self, token):
        """Number of the token's entry for this group, in arrays [B, tokens, G, ...]."""
        return self._first + token * self.image.groups

    def channel(self, token):
        """Number of the token's first channel for this block, in arrays [B, tokens, G, C]."""
        return self.entry(token) * self.image.channels + self._first_channel

    def copy_image(self, values):
        """Begins to copy all tokens' channels to shared memory."""
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

    def for_each_tile(self, tile: Callable):
        warp, tiles = self.warp, -(-self.image.tokens // QUERIES)
        steps = -(-tiles // warp.num_warps)
        warp.loop(steps, lambda step, _: tile(step * warp.num_warps + warp.warp))

    def queries(self, tile) -> Queries:
        warp, image = self.warp, self.image
        first = tile * QUERIES
        token = first + (warp.lane & (QUERIES - 1))
        exists = self.exists(token)
        token = self._moved_inside(token)
        x, y = warp.apply(
            lambda x, y: (x.astype(jnp.float32), y.astype(jnp.float32)),
            token % image.w,
            token // image.w,
        )
        return Queries(first, token, x, y, exists)

    def corners(self, points: "LoadedPoints", count: int, queries: Queries):
        """(where a row begins, in bytes, its weight) of each corner of the lane's point, in lists.

        If `count` is 1, the lower half of the warp has the left corners, the upper the right ones.
        """
        warp = self.warp
        both = warp.apply(
            functools.partial(_corners, image=self.image), points.fields, queries.x, queries.y
        )
        if count == 2:
            return both
        upper = warp.lane >> 4 == 1
        return [[warp.select(upper, x[i + 1], x[i]) for i in (0, 2)] for x in both]

    def exists(self, token):
        """Whether the token does; None if all do."""
        tiles = self.image.tokens / QUERIES / self.warp.num_warps
        return None if tiles.is_integer() else token < self.image.tokens

    def _moved_inside(self, token):
        if self.exists(token) is None:
            return token
        last = self.warp.constant(self.image.tokens - 1)
        return self.warp.select(token < self.image.tokens, token, last)

    def matrix_of_queries(self, ref, queries: Queries) -> list:
        """The queries' rows of `ref`, transposed, as right sides of products.

        Registers by eights of queries, and by pairs of chunks.
        """
        warp = self.warp
        octets = []
        for octet in range(2):
            query = self._moved_inside(queries.first + self.row + 8 * octet)
            start = self.channel(query) + self.column * 2
            octets.append(
                [
                    [warp.load_pair(ref, start + CHUNK * c) for c in pair]
                    for pair in self.chunk_pairs
                ]
            )
        return octets

    def rows(self, address, octet: int, chunks) -> list:
        """One or two chunks of the rows of 8 queries, the left side of products: 16 rows.

        Each of the queries' two rows is at the address that the query's lane has in one half of
        the warp.
        """
        warp = self.warp
        lane = warp.lane
        source = (lane & 7) + 8 * octet + (lane >> 3 & 1) * QUERIES
        address = warp.shuffle(address, source) + (lane >> 4) * CHUNK_BYTES
        return warp.load_matrices(
            address, offset=CHUNK_BYTES * chunks[0], count=2 * len(chunks), transposed=False
        )

    def rows_transposed(self, address, octet: int, chunk: int) -> list:
        """Chunks `chunk` and the next of the same rows, transposed: 16 channels of 16 rows."""
        warp = self.warp
        lane = warp.lane
        source = (lane & 7) + 8 * octet + (lane >> 4) * QUERIES
        address = warp.shuffle(address, source) + (lane >> 3 & 1) * CHUNK_BYTES
        return warp.load_matrices(address, offset=CHUNK_BYTES * chunk, count=4, transposed=True)

    def diagonal_selectors(self) -> tuple:
        """For the low and the high half of a register, what `permute_bytes` makes of it.

        The lane that has the diagonal's entry of its row keeps it, at the row's column; others
        have zero.
        """
        warp = self.warp
        on_diagonal = self.column == self.row >> 1
        odd = (self.row & 1) == 1

        def selector(if_even, if_odd):
            kept = warp.select(odd, warp.constant(if_odd), warp.constant(if_even))
            return warp.select(on_diagonal, kept, warp.constant(0x4444))

        return selector(0x4410, 0x1044), selector(0x4432, 0x3244)


class LoadedPoints(NamedTuple):
    """A sampling point of each lane."""

    fields: Points  # as `_read` takes them
    index: object  # number of the point in arrays [B, tokens, G, K]


class Sampler:
    """Loads the sampling points."""

    def __init__(self, block: Block, points: Points):
        self._block, self._points = block, points
        warp = block.warp
        self._per_group = [warp.load(ref, block.group) for ref in points.per_group]
        self._shared = {
            n: warp.load(ref, warp.constant(0), 2)
            for n, ref in enumerate(points.constant)
            if warp.rank(ref) == 1
        }

    def for_each_pair(self, queries: Queries, visit: Callable, carry=()):
        """The last of carry = visit(points, count, carry) for all points, two at a time.

        `count` is 2, or 1 for the last one. Points are loaded one visit ahead.
        """
        warp, num_points = self._block.warp, self._block.image.num_points

        def step(pair, state):
            loaded, carry = state
            ahead = self._load(queries, pair * 2 + 2)
            return ahead, visit(loaded, 2, carry)

        state = self._load(queries, warp.constant(0)), carry
        if num_points > 1:
            state = warp.loop(num_points // 2, step, state)
        loaded, carry = state
        return visit(loaded, 1, carry) if num_points % 2 else carry

    def _load(self, queries: Queries, first) -> LoadedPoints:
        """Point number `first` in the lower half of the warp, the next one in the upper half."""
        block, warp, points = self._block, self._block.warp, self._points
        num_points = block.image.num_points
        k = first + (warp.lane >> 4)
        k = warp.select(k < num_points, k, warp.constant(num_points - 1))
        index = block.entry(queries.token) * num_points + k
        rank = warp.rank(points.weights)
        per_query = [
            warp.load(ref, index) if warp.rank(ref) == rank else warp.load(ref, index * 2, 2)
            for ref in points.per_query
        ]
        constant = []
        for n, ref in enumerate(points.constant):
            if n in self._shared:
                constant.append(self._shared[n])
            else:  # [K, 2]
                x, y = warp.load(ref, k * 2, 2)
                constant.append({(0, 0): x, (0, 1): y})
        return LoadedPoints(type(points)(*per_query, *self._per_group, *constant), index)


# --- arithmetic of one lane's point, in JAX -------------------------------------------------------


def _read(field, k, *index):
    """An entry of a per-query field, of which a lane holds only its own point's."""
    del k
    return field[index[0]] if index else field


def located(points: Points, query_x, query_y, image: Image):
    """(the lane's point, its corners along x, along y)."""
    point = points.point(_read, 0)
    x, y = discard_non_finite(point.dx + query_x, point.dy + query_y)
    return point, corners(x, image.w, image.boundary), corners(y, image.h, image.boundary)


def _corners(points: Points, query_x, query_y, *, image: Image):
    """(where the rows of the four corners begin, in bytes; their weights), row by row."""
    point, columns, rows = located(points, query_x, query_y, image)
    offsets, weights = [], []
    for j in range(2):
        row = rows.index[j] * (image.w * image.pitch)
        share = rows.weight[j] * point.weight
        for i in range(2):
            offsets.append(row + columns.index[i] * image.pitch)
            weights.append(share * columns.weight[i])
    return offsets, weights


def gradients_of_point(points: Points, query_x, query_y, products, *, image: Image):
    """The gradients of the point's fields from d out . v of its four corners."""
    point, columns, rows = located(points, query_x, query_y, image)
    d_dx = d_dy = d_weight = 0.0
    for n, product in enumerate(products):
        j, i = divmod(n, 2)
        d_weight += rows.weight[j] * columns.weight[i] * product
        d_dx += rows.weight[j] * columns.slope[i] * product
        d_dy += rows.slope[j] * columns.weight[i] * product
    return point.pull_back(point.weight * d_dx, point.weight * d_dy, d_weight)
