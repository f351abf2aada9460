"""What a warp of this directory's Mosaic GPU kernels has: 32 queries of a group, one a lane.

Lanes' values are `warp.Lanes`; the arithmetic of a lane's own sampling point is JAX's.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv.image import Image
from pallas_kernels.deformable_conv.point_rows import QUERIES, PointRows
from pallas_kernels.deformable_conv.points import Points, PointsTangent
from pallas_kernels.deformable_conv.warp import Warp


def num_tiles(image: Image) -> int:
    """How many tiles of 32 queries there are."""
    return -(-image.tokens // QUERIES)


class Queries(NamedTuple):
    """The queries of a warp, one a lane. Beyond the last one, it is the last."""

    first: object
    token: object
    exists: object  # None if all do
    x: object  # float32
    y: object


class Extents(NamedTuple):
    """The lowest and the highest token from which any corners begin, of several queries or points.

    Of a call, int32 [B, G, tiles of queries].
    """

    lowest: object
    highest: object

    def touch(self, first, count, image: Image):
        """Whether any corner may be among `count` tokens."""
        return (self.lowest < first + count) & (first < self.highest + (image.w + 2))


def point_gradient_structs(points: Points, dtypes: tuple, image: Image) -> tuple:
    """What kernels of the points' gradients write: these, and where the points lie (Extents)."""
    gradients = (
        jax.ShapeDtypeStruct(x.shape, dtype)
        for x, dtype in zip(points.per_query, dtypes, strict=True)
    )
    shape = points.weights.shape[0], image.groups, num_tiles(image)
    return *gradients, *Extents(*[jax.ShapeDtypeStruct(shape, jnp.int32)] * 2)


class Group:
    """One group of one image, as one warp sees it."""

    def __init__(self, warp: Warp, image: Image, number, points: Points):
        self.warp, self.image, self.number = warp, image, number
        self._group = number % image.groups
        self._first = (number // image.groups) * (image.tokens * image.groups) + self._group
        self.points = self.rows_of(points)

    def rows_of(self, points: Points | PointsTangent) -> PointRows:
        return PointRows(self.warp, self.image, points, self._group, self._first)

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

    def extent(self, token) -> Extents:
        """Of a point, of all lanes."""
        return Extents(self.warp.lowest(token), self.warp.highest(token))

    def extents(self, tokens: list) -> Extents:
        """Of several points, of all lanes."""
        own = self.union([Extents(token, token) for token in tokens])
        return Extents(self.warp.lowest(own.lowest), self.warp.highest(own.highest))

    def union(self, extents: list[Extents]) -> Extents:
        def ends(extents):
            return Extents(
                functools.reduce(jnp.minimum, [x.lowest for x in extents]),
                functools.reduce(jnp.maximum, [x.highest for x in extents]),
            )

        return self.warp.apply(ends, extents)

    def store_extents(self, extents: Extents, tile, refs: Extents) -> None:
        """Writes those of a tile's queries."""
        index = self.number * num_tiles(self.image) + tile
        for number, ref in zip(extents, refs, strict=True):
            self.warp.store_pair(ref, index, number, mask=self.warp.lane == 0)


def for_each_tile(group: Group, copy: Callable, visit: Callable, scratch, *others) -> None:
    """Calls visit(number, words of its points, is_there) for the tiles of 32 queries of an image.

    With `others`, rows of the points' tangent, their words come after those of the points.

    copy() begins to copy the image to shared memory; is_there() waits for it, which all warps of
    the block do, hence in the first step all have a tile, maybe another's. The warps take turns,
    and points are loaded one tile ahead.
    """
    warp, rows, tiles = group.warp, (group.points, *others), num_tiles(group.image)
    workers = warp.num_warps
    steps = -(-tiles // workers)

    def tile(step):
        """(its number, whether it is there: None if it always is)."""
        number = step * workers + warp.warp
        if tiles % workers == 0:
            return number, None
        exists = number < tiles
        return warp.select(exists, number, warp.constant(0)), exists

    def load(step):
        number = tile(step)[0]
        return [x.load(number) for x in rows]

    def step(n, loaded):
        number, exists = tile(n)
        first = n == 0

        def visit_tile(loaded):
            words = [x.exchange(y, scratch) for x, y in zip(rows, loaded, strict=True)]
            if steps > 1:
                loaded = warp.when(n + 1 < steps, lambda _: load(n + 1), loaded)
            visit(number, *words, lambda: warp.when(first, lambda _: warp.wait_for_copies()))
            return loaded

        if exists is None:
            return visit_tile(loaded)
        return warp.when(exists | first, visit_tile, loaded)

    loaded = load(warp.constant(0))
    copy()
    warp.loop(steps, step, loaded)
