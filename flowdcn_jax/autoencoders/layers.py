"""Layers that the autoencoders share. Arrays are NHWC."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.precision import matmul_precision


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the layers of a network, which compute in `dtype`.

    Their parameters are float32. They are loaded, never trained here: they start at zero, which is
    the fastest to trace.
    """

    dtype: Any
    rngs: nnx.Rngs
    norm_groups: int
    norm_epsilon: float

    @property
    def exact(self) -> "Layers":
        """Makes the same layers, computed in float32."""
        return dataclasses.replace(self, dtype=jnp.float32)

    def conv(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        use_bias: bool = True,
    ) -> nnx.Conv:
        """A square convolution; `padding` (before, after) of both axes, by default half of it."""
        if padding is None:
            padding = (kernel_size // 2,) * 2
        return nnx.Conv(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            strides=stride,
            padding=(padding, padding),
            use_bias=use_bias,
            dtype=self.dtype,
            precision=matmul_precision(self.dtype),
            kernel_init=nnx.initializers.zeros_init(),
            rngs=self.rngs,
        )

    def linear(self, in_features: int, out_features: int) -> nnx.Linear:
        """A linear layer."""
        return nnx.Linear(
            in_features,
            out_features,
            dtype=self.dtype,
            precision=matmul_precision(self.dtype),
            kernel_init=nnx.initializers.zeros_init(),
            rngs=self.rngs,
        )

    def group_norm(self, features: int) -> nnx.GroupNorm:
        """GroupNorm with float32 statistics in two passes."""
        return nnx.GroupNorm(
            features,
            self.norm_groups,
            epsilon=self.norm_epsilon,
            use_fast_variance=False,
            dtype=self.dtype,
            rngs=self.rngs,
        )


def upsample(x: Array) -> Array:
    """[B,h,w,C] -> [B,2h,2w,C], nearest neighbour."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
