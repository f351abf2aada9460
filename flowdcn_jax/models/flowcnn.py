"""FlowCNN: FlowDCN with an ordinary convolution in the place of the deformable one.

The paper compares with it (FlowCNN-3x3 and -5x5) without saying its exact form. Here the Linears
before and after stay, and between them a k x k convolution in the same groups, zero-padded, takes
the place of the deformable aggregation and of the Linears that steer it. Of the S/2 size that is
32.0 M parameters with 3x3 and 36.7 M with 5x5, beside FlowDCN's 30.3 M; a convolution without
groups would take 45 M and 74 M, one of single channels would leave 29 M and next to no mixing.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.errors import ConfigError
from flowdcn_jax.models import layers
from flowdcn_jax.models.flowdcn import FlowDCNBlock
from flowdcn_jax.models.products import convolution
from flowdcn_jax.models.velocity_network import NetworkOptions, VelocityNetwork, linear_options
from flowdcn_jax.options import at_least, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowCNNOptions(NetworkOptions):
    """config.model of a FlowCNN."""

    num_groups: int = option(6, "groups of the convolution; divides width", at_least(1), fixed=True)
    kernel_size: int = option(3, "tokens a side of the kernel; odd", at_least(1), fixed=True)

    def __post_init__(self):
        super().__post_init__()
        self._require_multiple("width", "num_groups")
        if self.kernel_size % 2 == 0:
            raise ConfigError(
                f"config.model.kernel_size is {self.kernel_size}; expected an odd number"
            )


class GroupedConv(nnx.Module):
    """Linear, a convolution in which each group sees its own channels alone, Linear."""

    def __init__(self, options: FlowCNNOptions, *, rngs: nnx.Rngs):
        width, shared = options.width, linear_options(options, rngs)
        zeros = nnx.initializers.zeros_init()
        self.values = layers.Linear(width, width, bias_init=zeros, **shared)
        self.spatial = SpatialConv(options, rngs=rngs)
        self.out = layers.Linear(width, width, bias_init=zeros, **shared)

    def __call__(self, x: Array) -> layers.Branch:
        """x [B,h,w,d] -> [B,h,w,d]."""
        return self.out.apart(self.spatial(self.values(x)))


class SpatialConv(nnx.Module):
    """A k x k convolution in groups, without a bias: the Linear after it has one."""

    def __init__(self, options: FlowCNNOptions, *, rngs: nnx.Rngs):
        side, channels = options.kernel_size, options.width // options.num_groups
        init = layers.uniform_fan_in(side**2 * channels)
        self.groups = options.num_groups
        self.gradient_dtype = jnp.dtype(options.gradient_dtype)
        self.kernel = nnx.Param(init(rngs.params(), (side, side, channels, options.width)))

    def __call__(self, x: Array) -> Array:
        """x [B,h,w,d] -> [B,h,w,d]."""
        return convolution(
            x, self.kernel[...], groups=self.groups, gradient_dtype=self.gradient_dtype
        )


class FlowCNN(VelocityNetwork):
    """FlowDCN's network with grouped convolutions."""

    def make_block(self, options: FlowCNNOptions, *, rngs: nnx.Rngs) -> FlowDCNBlock:
        return FlowDCNBlock(GroupedConv, options, norm="rms_norm", mlp="swiglu", rngs=rngs)
