"""Layers that the autoencoders share.

Their parameters are loaded, never trained here: they start at zero, which is the fastest to trace.
Arrays are NHWC, parameters float32, and `dtype` is the compute dtype.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.precision import matmul_precision


def conv(
    in_features: int,
    out_features: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    use_bias: bool = True,
    dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution; `padding` (before, after) of both axes, by default half the kernel."""
    if padding is None:
        padding = (kernel_size // 2,) * 2
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=(padding, padding),
        use_bias=use_bias,
        dtype=dtype,
        precision=matmul_precision(dtype),
        kernel_init=nnx.initializers.zeros_init(),
        rngs=rngs,
    )


def linear(in_features: int, out_features: int, *, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        in_features,
        out_features,
        dtype=dtype,
        precision=matmul_precision(dtype),
        kernel_init=nnx.initializers.zeros_init(),
        rngs=rngs,
    )


def group_norm(
    features: int, num_groups: int, *, epsilon: float, dtype, rngs: nnx.Rngs
) -> nnx.GroupNorm:
    """GroupNorm with float32 statistics in two passes."""
    return nnx.GroupNorm(
        features, num_groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


def upsample(x: Array) -> Array:
    """[B,h,w,C] -> [B,2h,2w,C], nearest neighbour."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
