"""Block sizes of the kernels, from shape and dtype. `python -m pallas_kernels.deformable_conv.tune`
searches for better ones."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.deformable_conv.tiles import Grid

LOAD_BYTES = 16  # of one load instruction of one thread
MAX_CHANNELS = 128  # sums of more channels would not fit the registers
MAX_CONNECTED_POINTS = 31  # points a pair of tiles for which there are bits


class GatherBlocks(NamedTuple):
    """Of the kernels of gather.py."""

    tile: tuple[int, int]  # (height, width), in queries
    chunk: int  # channels that are loaded at a time
    num_warps: int


class TentBlocks(NamedTuple):
    """Of the kernels of tent.py."""

    query_tile: tuple[int, int]  # (height, width)
    token_tile: tuple[int, int]
    tiles_per_program: int
    skip: bool
    num_warps: int
    num_stages: int


class Blocks(NamedTuple):
    """Block sizes of one call."""

    forward: GatherBlocks
    point_gradients: GatherBlocks
    values_gradient: TentBlocks


def choose(h: int, w: int, num_points: int, dtype) -> Blocks:
    """The block sizes for images of h x w tokens."""
    gather = GatherBlocks(_tile(64, 8, w), LOAD_BYTES // jnp.dtype(dtype).itemsize, num_warps=2)
    token_tile = _tile(64, 16, w)
    token_tiles = Grid(h, w, *token_tile).tiles
    if token_tiles <= 4 or num_points > MAX_CONNECTED_POINTS:
        # Every query may reach every token: share its coordinates between the tiles.
        wide = jnp.dtype(dtype).itemsize > 2
        tent = TentBlocks(
            query_tile=_tile(64 if wide else 128, 16, w),
            token_tile=token_tile,
            tiles_per_program=min(token_tiles, 2 if wide else 4),
            skip=False,
            num_warps=4 if wide else 8,
            num_stages=1,
        )
    else:
        tent = TentBlocks(
            query_tile=_tile(64, 8, w),
            token_tile=_tile(64, 8, w),
            tiles_per_program=1,
            skip=True,
            num_warps=4,
            num_stages=1,
        )
    return Blocks(forward=gather, point_gradients=gather, values_gradient=tent)


def _tile(size: int, width: int, w: int) -> tuple[int, int]:
    """(height, width) of a tile of `size` tokens, at most `width` wide and as `w` needs."""
    width = min(width, 1 << (w - 1).bit_length())
    return size // width, width
