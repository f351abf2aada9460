"""Which kernels do a call, and their block sizes, from shape and dtype: as measured on an H100.

`python -m pallas_kernels.deformable_conv.tune` measures other sizes.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.deformable_conv import backends
from pallas_kernels.deformable_conv.grid import Grid
from pallas_kernels.deformable_conv.limits import product_dtype, why_not_indexable
from pallas_kernels.deformable_conv.points import Points

LOAD_BYTES = 16  # of one load instruction of one thread
MAX_CHANNELS = 128  # sums of more channels would not fit the registers
MAX_CONNECTED_POINTS = 31  # points a pair of tiles for which there are bits
FEW_TOKENS = 256  # of which a tile of queries may touch any
TOKEN_TILE = 64  # tokens; up to four such tiles, a tile of queries may as well look at all tokens


class Gather(NamedTuple):
    """gather.forward, gather.tangent."""

    tile: tuple[int, int]  # (height, width), in queries
    chunk: int  # channels that are loaded at a time
    num_warps: int

    def options(self, h: int, w: int) -> dict:
        return dict(grid=Grid(h, w, *self.tile), chunk=self.chunk, num_warps=self.num_warps)


class RowGather(NamedTuple):
    """row_gather.forward, row_gather.point_gradients; for Hopper GPUs."""

    num_warps: int  # a multiple of 4

    def options(self, h: int, w: int) -> dict:
        return dict(h=h, w=w, **self._asdict())


class RowProducts(NamedTuple):
    """row_products.forward, .tangent and .point_gradients; for Hopper GPUs."""

    num_warps: int  # a multiple of 4

    def options(self, h: int, w: int) -> dict:
        return dict(h=h, w=w, **self._asdict())


class RowSlices(NamedTuple):
    """row_slices.forward, row_slices.tangent; for Hopper GPUs."""

    num_warps: int  # a multiple of 4

    def options(self, h: int, w: int) -> dict:
        return dict(h=h, w=w, **self._asdict())


class SparseMatrix(NamedTuple):
    """sparse_matrix.py, sparse_transpose.py; for Hopper GPUs."""

    window: int  # blocks of 16 columns in shared memory; a power of two
    num_warps: int  # a multiple of 4; for values_gradient, at most `window`

    def options(self, h: int, w: int) -> dict:
        return dict(h=h, w=w, **self._asdict())


class PointLists(NamedTuple):
    """list_gradient.values_gradient; for Hopper GPUs."""

    num_warps: int  # a multiple of 4

    def options(self, h: int, w: int) -> dict:
        return dict(h=h, w=w, **self._asdict())


class Product(NamedTuple):
    """tent.forward, products.point_gradients."""

    query_tile: tuple[int, int]  # (height, width)
    token_tile: tuple[int, int]
    num_warps: int

    def options(self, h: int, w: int) -> dict:
        return _in_grids(self, h, w)


class TransposedProduct(NamedTuple):
    """tent.values_gradient."""

    query_tile: tuple[int, int]
    token_tile: tuple[int, int]
    tiles_per_program: int
    skip: bool
    num_warps: int

    def options(self, h: int, w: int) -> dict:
        return _in_grids(self, h, w)


Triton = Gather | Product | TransposedProduct  # by Pallas' Triton; the others are Mosaic GPU's


class Blocks(NamedTuple):
    """Block sizes of one call."""

    forward: Gather | Product | RowGather | RowProducts | RowSlices
    point_gradients: Product | RowGather | RowProducts | SparseMatrix
    values_gradient: PointLists | SparseMatrix | TransposedProduct


def choose(
    h: int, w: int, channels: int, num_points: int, dtype, weights_dtype=None, *, hopper: bool
) -> Blocks:
    """The block sizes for images of h x w tokens, on a Hopper GPU or another one.

    Values are of `dtype`, and so are the weights by default.
    """
    sizes = h, w, channels, num_points
    blocks = _choose(*sizes, dtype, hopper)
    product = product_dtype(dtype, weights_dtype or dtype)
    if product != jnp.dtype(dtype):  # as for float32, where kernels multiply by weights
        others = _choose(*sizes, product, hopper)
        blocks = blocks._replace(forward=others.forward, values_gradient=others.values_gradient)
    return blocks


def choose_tangent(
    h: int, w: int, channels: int, num_points: int, dtype, weights_dtype=None, *, hopper: bool
) -> Gather | RowProducts | RowSlices:
    """The same of the derivative along a direction."""
    sizes = h, w, channels, num_points, product_dtype(dtype, weights_dtype or dtype)
    if hopper:
        from pallas_kernels.deformable_conv import row_products, row_slices  # of Mosaic GPU

        if h * w <= FEW_TOKENS and row_products.why_not(*sizes) is None:
            return RowProducts(num_warps=8)
        if row_slices.why_not(*sizes) is None:
            share = row_slices.share_a_multiprocessor(h, w, num_points, dtype, num_warps=8)
            return RowSlices(num_warps=8 if share else 12)
    wide = jnp.dtype(dtype).itemsize > 2
    return Gather(tile(16 if wide else 32, 8, w), chunk=32, num_warps=4)


def why_not_forward(values, points: Points, tiling) -> str | None:
    """Why the kernel of `tiling` can't do a pass of arrays of such shapes; None if it can."""
    if reason := why_not_indexable(array.shape for array in (values, *points)):
        return reason
    return backends.why_not(backends.TRITON) if isinstance(tiling, Triton) else None


def why_not_backward(values, points: Points, blocks: Blocks) -> str | None:
    """The same of a backward pass with the kernels of `blocks`."""
    tiling, (batch, h, w, groups, _) = blocks.values_gradient, values.shape
    for each in (blocks.point_gradients, tiling):
        if reason := why_not_forward(values, points, each):
            return reason
    if isinstance(tiling, TransposedProduct) and tiling.skip:
        queries, tokens = Grid(h, w, *tiling.query_tile), Grid(h, w, *tiling.token_tile)
        return why_not_indexable([(batch, queries.tiles, groups, tokens.tiles)])  # bits of points
    return None


def _choose(h: int, w: int, channels: int, num_points: int, dtype, hopper: bool) -> Blocks:
    blocks = _choose_triton(h, w, channels, num_points, dtype)
    if not hopper:
        return blocks
    # They import Mosaic GPU.
    from pallas_kernels.deformable_conv import (
        list_gradient,
        row_gather,
        row_products,
        row_slices,
        sparse_matrix,
    )

    few_tokens, wide = h * w <= FEW_TOKENS, jnp.dtype(dtype).itemsize > 2
    slices = None
    if row_slices.why_not(h, w, channels, num_points, dtype) is None:
        share = row_slices.share_a_multiprocessor(h, w, num_points, dtype, num_warps=8)
        slices = RowSlices(num_warps=8 if share else 12)
        blocks = blocks._replace(forward=slices)
    lists = list_gradient.why_not(h, w, channels, num_points, dtype) is None
    if lists:
        blocks = blocks._replace(values_gradient=PointLists(num_warps=8 if wide else 4))
    if row_gather.why_not(h, w, channels, num_points) is None:
        sizes = RowGather(num_warps=8 if few_tokens or wide else 12)
        blocks = blocks._replace(point_gradients=sizes)
        if few_tokens or (not wide and row_gather.fits(h, w, channels, dtype)):
            blocks = blocks._replace(forward=RowGather(num_warps=8))
    if sparse_matrix.why_not(h, w, channels, num_points, dtype) is None:
        sizes = SparseMatrix(window=4, num_warps=4 if few_tokens else 8)
        if sparse_matrix.fits(h, w, channels, **sizes._asdict()):
            blocks = blocks._replace(point_gradients=sizes)
        if few_tokens or not lists:
            blocks = blocks._replace(values_gradient=SparseMatrix(window=8, num_warps=4))
    if row_products.why_not(h, w, channels, num_points, dtype) is None:
        sizes = RowProducts(num_warps=8)
        blocks = blocks._replace(forward=sizes)
        if not few_tokens:
            blocks = blocks._replace(point_gradients=sizes)
    if slices and not few_tokens and channels % row_slices.SLICE == 0:  # none is partly empty
        blocks = blocks._replace(forward=slices)
    return blocks


def _choose_triton(h: int, w: int, channels: int, num_points: int, dtype) -> Blocks:
    wide = jnp.dtype(dtype).itemsize > 2
    token_tile = tile(TOKEN_TILE, 16, w)
    token_tiles = Grid(h, w, *token_tile).tiles
    few_tiles = token_tiles <= 4

    if few_tiles and not wide:
        forward = Product(token_tile, token_tile, num_warps=4)
    else:
        forward = Gather(tile(16 if wide else 32, 8, w), chunk=32, num_warps=4)

    if wide:
        point_gradients = Product(token_tile, token_tile, num_warps=4)
    elif few_tiles:
        whole = max(TOKEN_TILE, _power_of_two(token_tiles) * TOKEN_TILE)
        point_gradients = Product(token_tile, tile(whole, 16, w), num_warps=4)
    else:
        point_gradients = Product(tile(64, 8, w), tile(128, 16, w), num_warps=4)

    if few_tiles or num_points > MAX_CONNECTED_POINTS:
        values_gradient = TransposedProduct(
            query_tile=tile(64 if wide else 16, 16, w),
            token_tile=token_tile,
            tiles_per_program=min(_power_of_two(token_tiles), 2 if wide else 4),
            skip=False,
            num_warps=4,
        )
    else:
        values_gradient = TransposedProduct(
            query_tile=tile(64, 8, w),
            token_tile=tile(64, 8, w),
            tiles_per_program=1,
            skip=True,
            num_warps=4,
        )
    return Blocks(forward, point_gradients, values_gradient)


def _in_grids(tiling: Product | TransposedProduct, h: int, w: int) -> dict:
    options = tiling._asdict()
    tiles = {"queries": options.pop("query_tile"), "tokens": options.pop("token_tile")}
    return {name: Grid(h, w, *sides) for name, sides in tiles.items()} | options


def tile(size: int, width: int, w: int) -> tuple[int, int]:
    """(height, width) of a tile of `size` tokens, at most `width` wide and as `w` needs."""
    width = min(width, size, _power_of_two(w))
    return size // width, width


def _power_of_two(number: int) -> int:
    """The least one that is no smaller."""
    return 1 << (number - 1).bit_length()
