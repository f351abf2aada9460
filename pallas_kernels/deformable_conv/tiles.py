"""Tiles of tokens, and how kernels read and write their tokens' entries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import triton as backend
from pallas_kernels.deformable_conv.grid import Grid, quotient, remainder


class Tile(NamedTuple):
    """The tokens of one tile; arrays are [tile size]."""

    x: jax.Array  # int32
    y: jax.Array
    inside: jax.Array  # bool: the token exists
    token: jax.Array  # int32, y * w + x; one past the last where it does not exist

    def read_channels(self, ref, first, count: int) -> jax.Array:
        """ref[token, first : first + count] as it is; 0 where there is no such entry."""
        return load_rows(ref, self.token, first, count, self.inside)

    def write_channels(self, ref, first, value: jax.Array) -> None:
        """ref[token, first : first + count] = value, where there is such an entry."""
        channel = first + backend.iota(value.shape[1])[None, :]
        mask = self.inside[:, None] & (channel < ref.shape[-1])
        backend.store(ref.at[self.token[:, None], channel], value.astype(ref.dtype), mask=mask)

    def point(self, points, k):
        """(x, y, point): the finite coordinates of sampling point k, and what points.py gives.

        Arrays are [queries] float32; for several points, k int32 [1, points], [queries, points].
        """
        axes = _axes(k)
        x, y = (z.astype(jnp.float32)[axes] for z in (self.x, self.y))
        return points.point(self._reader(k), k).seen_from(x, y)

    def tangent(self, point, tangent, k) -> tuple:
        """(d dx, d dy, d weight) of sampling point k, which `self.point` has given."""
        return point.push_forward(*tangent.entries(self._reader(k), k))

    def _reader(self, k):
        axes = _axes(k)

        def read(ref, *index):
            at = ref.at[(self.token[axes], *index)]
            return backend.load(at, mask=self.inside[axes], other=0.0).astype(jnp.float32)

        return read

    def all_points(self, points) -> list:
        """[(x, y, weight)] of all sampling points, [queries] each."""
        num_points = points.weights.shape[-1]
        number = backend.iota(1 << (num_points - 1).bit_length())[None, :]
        x, y, point = self.point(points, jnp.minimum(number, num_points - 1))
        columns = (backend.columns(z) for z in (x, y, point.weight))
        return list(zip(*columns, strict=True))[:num_points]

    def write_points(self, ref, k, *index, value: jax.Array, exists: jax.Array) -> None:
        """ref[token, k, *index] = value [queries, points] where token and point exist."""
        mask = self.inside[:, None] & exists
        at = ref.at[(self.token[:, None], k, *index)]
        backend.store(at, value.astype(ref.dtype), mask=mask)


def tile_of(grid: Grid, number) -> Tile:
    """The tokens of a tile, by its number."""
    first_x, first_y = grid.first(number)
    local = backend.iota(grid.tile_size)
    x = first_x + remainder(local, grid.tile_w)
    y = first_y + quotient(local, grid.tile_w)
    inside = (x < grid.w) & (y < grid.h)
    return Tile(x, y, inside, jnp.where(inside, y * grid.w + x, grid.h * grid.w))


def _axes(k):
    return (slice(None), None) if jnp.ndim(k) else slice(None)


def load_rows(ref, row: jax.Array, first, count: int, mask: jax.Array | None = None) -> jax.Array:
    """ref[row, first : first + count] of rows that exist, [rows, count]; 0 beyond the channels."""
    channels = ref.shape[-1]
    channel = first + backend.iota(count)[None, :]
    index = ref.at[row[:, None], channel]
    static_first = first if isinstance(first, int) else channels
    if static_first + count <= channels and mask is None:
        return backend.load(index)
    keep = channel < channels
    if mask is not None:
        keep = keep & mask[:, None]
    return backend.load(index, mask=jnp.broadcast_to(keep, (row.shape[0], count)), other=0.0)


def channel_blocks(channels: int) -> list[tuple[int, int]]:
    """(first, size) of blocks, powers of two that a matrix product takes, over the channels."""
    blocks, first = [], 0
    while first < channels:
        size = max(backend.MIN_DOT, 1 << ((channels - first).bit_length() - 1))
        blocks.append((first, size))
        first += size
    return blocks
