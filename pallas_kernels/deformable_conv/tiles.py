"""Tiles of tokens, and how kernels read and write their tokens' entries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import triton as backend


class Grid(NamedTuple):
    """The tokens of an image, in tiles; tiles at the right and bottom border may hang over."""

    h: int
    w: int
    tile_h: int  # a power of two
    tile_w: int  # likewise

    @property
    def tiles_x(self) -> int:
        return -(-self.w // self.tile_w)

    @property
    def tiles_y(self) -> int:
        return -(-self.h // self.tile_h)

    @property
    def tiles(self) -> int:
        return self.tiles_x * self.tiles_y

    @property
    def tile_size(self) -> int:
        return self.tile_h * self.tile_w

    def first(self, number):
        """(x, y) of the first token of a tile, int32."""
        x, y = _remainder(number, self.tiles_x), _quotient(number, self.tiles_x)
        return x * self.tile_w, y * self.tile_h

    def tile(self, number) -> "Tile":
        first_x, first_y = self.first(number)
        local = backend.iota(self.tile_size)
        x = first_x + _remainder(local, self.tile_w)
        y = first_y + _quotient(local, self.tile_w)
        inside = (x < self.w) & (y < self.h)
        return Tile(x, y, inside, jnp.where(inside, y * self.w + x, self.h * self.w))


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


# For numbers that are not negative; jnp's own take care of signs.


def _quotient(number, divisor: int):
    return number if divisor == 1 else jax.lax.div(number, jnp.int32(divisor))


def _remainder(number, divisor: int):
    return jnp.zeros_like(number) if divisor == 1 else jax.lax.rem(number, jnp.int32(divisor))
