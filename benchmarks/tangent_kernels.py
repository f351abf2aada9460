"""The kernels that can give the deformable aggregation's derivative along a direction."""

from collections.abc import Iterator

import jax.numpy as jnp

from pallas_kernels.deformable_conv import row_products, row_slices
from pallas_kernels.deformable_conv.blocks import Gather, RowProducts, RowSlices, tile
from pallas_kernels.deformable_conv.image import Image
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES


def candidates(
    h: int, w: int, channels: int, num_points: int, dtype, *, hopper: bool
) -> Iterator[Gather | RowProducts | RowSlices]:
    """Block sizes worth a measurement."""
    sizes = h, w, channels, num_points, jnp.dtype(dtype)
    wide = jnp.dtype(dtype).itemsize > 2
    yield Gather(tile(16 if wide else 32, 8, w), chunk=32, num_warps=4)
    image = Image(1, h, w, channels, num_points, jnp.dtype(dtype), "zeros")
    if hopper and row_products.why_not(*sizes) is None:
        for num_warps in (4, 8):
            if row_products.tangent_layout(image, num_warps).shared_bytes <= MAX_SHARED_BYTES:
                yield RowProducts(num_warps)
    if hopper and row_slices.why_not(*sizes) is None:
        share = row_slices.share_a_multiprocessor(h, w, num_points, dtype, num_warps=8)
        yield RowSlices(8 if share else 12)
