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
from flowdcn_jax.models.velocity_network import NetworkOptions, VelocityNetwork
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
        width, side, dtype = options.width, options.kernel_size, options.compute_dtype
        zeros = nnx.initializers.zeros_init()
        self.values = layers.linear(width, width, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.spatial = nnx.Conv(
            width,
            width,
            (side, side),
            feature_group_count=options.num_groups,
            use_bias=False,  # the Linear after it has one
            dtype=dtype,
            param_dtype=jnp.float32,
            precision=layers.matmul_precision(dtype),
            kernel_init=layers.uniform_fan_in(side**2 * (width // options.num_groups)),
            rngs=rngs,
        )
        self.out = layers.linear(width, width, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [B,h,w,d] -> [B,h,w,d]."""
        return self.out(self.spatial(self.values(x)))


class FlowCNN(VelocityNetwork):
    """FlowDCN's network with grouped convolutions."""

    def make_block(self, options: FlowCNNOptions, *, rngs: nnx.Rngs) -> FlowDCNBlock:
        return FlowDCNBlock(GroupedConv, options, norm="rms_norm", mlp="swiglu", rngs=rngs)
