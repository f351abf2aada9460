"""FlowCNN: FlowDCN with an ordinary convolution in the place of the deformable one.

The paper compares with it (FlowCNN-3x3 and -5x5) without saying its exact form. Here the Linears
before and after stay, and between them a k x k convolution in the same groups, zero-padded, takes
the place of the deformable aggregation and of the Linears that steer it. Of the S/2 size that is
32.0 M parameters with 3x3 and 36.7 M with 5x5, beside FlowDCN's 30.3 M; a convolution without
groups would take 45 M and 74 M, one of single channels would leave 29 M and next to no mixing.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.models import layers
from flowdcn_jax.models.flowdcn import FlowDCNBlock
from flowdcn_jax.models.velocity_network import VelocityNetwork


class GroupedConv(nnx.Module):
    """Linear, a convolution in which each group sees its own channels alone, Linear."""

    def __init__(self, width: int, num_groups: int, *, kernel_size: int, dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        fan_in = kernel_size**2 * (width // num_groups)
        self.values = layers.linear(width, width, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.spatial = nnx.Conv(
            width,
            width,
            (kernel_size, kernel_size),
            feature_group_count=num_groups,
            use_bias=False,  # the Linear after it has one
            dtype=dtype,
            param_dtype=jnp.float32,
            precision=layers.matmul_precision(dtype),
            kernel_init=layers.uniform_fan_in(fan_in),
            rngs=rngs,
        )
        self.out = layers.linear(width, width, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [B,h,w,d] -> [B,h,w,d]."""
        return self.out(self.spatial(self.values(x)))


class FlowCNN(VelocityNetwork):
    """FlowDCN's network with grouped convolutions.

    Args:
        num_groups: groups of the convolution, as many as FlowDCN's; they divide width.
        kernel_size: side of the convolution's kernel, in tokens.
        The others are FlowDCN's.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_groups: int,
        kernel_size: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        learn_sigma: bool,
        dtype,
        remat: bool,
        rngs: nnx.Rngs,
    ):
        make_conv = functools.partial(GroupedConv, width, num_groups, kernel_size=kernel_size)
        super().__init__(
            lambda: FlowDCNBlock(
                width, make_conv, norm="rms_norm", mlp="swiglu", dtype=dtype, rngs=rngs
            ),
            width=width,
            depth=depth,
            patch_size=patch_size,
            in_channels=in_channels,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            dtype=dtype,
            remat=remat,
            rngs=rngs,
        )
