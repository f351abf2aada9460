"""FlowDCN (arXiv 2410.22655, section 3): a convolutional velocity network for flow matching.

Every token gathers `SAMPLING_POINTS` bilinear samples of its group's values around itself; where
they lie is predicted by the token (directions and scales), so the receptive field follows the
content and no position embedding is needed: any h x w works.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flowdcn_jax.models import layers
from flowdcn_jax.models.velocity_network import (
    AdaLNBlock,
    NetworkOptions,
    VelocityNetwork,
    float32_options,
    linear_options,
)
from flowdcn_jax.options import POSITIVE, at_least, one_of, option
from pallas_kernels.deformable_conv import multiscale_deformable_aggregate

SAMPLING_POINTS = 9  # K: a 3x3 grid


def direction_prior() -> np.ndarray:
    """The frozen prior of the sampling directions: the 3x3 grid on [-1,1]^2, x fastest; [K,2]."""
    ys, xs = np.meshgrid(np.linspace(-1, 1, 3), np.linspace(-1, 1, 3), indexing="ij")
    return np.stack([xs, ys], axis=-1).reshape(SAMPLING_POINTS, 2).astype(np.float32)


def initial_scale_prior(num_groups: int) -> np.ndarray:
    """logit((g+1)/G - 1e-4): group g starts with the radius (g+1)/G of max_scale; [G]."""
    fraction = (np.arange(num_groups) + 1) / num_groups - 1e-4
    return np.log(fraction / (1 - fraction)).astype(np.float32)


def single_scale_prior(num_groups: int) -> np.ndarray:
    """0: every group starts with half of max_scale, as it would with no prior at all; [G].

    That is close to the mean radius of `initial_scale_prior`, (G+1)/2G, so what an ablation takes
    away is the spread over the groups, not reach.
    """
    return np.zeros(num_groups, np.float32)


SCALE_PRIORS = {"multiscale": initial_scale_prior, "single_scale": single_scale_prior}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowDCNOptions(NetworkOptions):
    """config.model of a FlowDCN. The paper's ablations differ in the last four."""

    num_groups: int = option(
        6, "groups of the deformable convolution; divides width", at_least(1), fixed=True
    )
    boundary: str = option(
        "zeros",
        "how borders are sampled; truncate: as released weights were trained",
        one_of("zeros", "truncate"),
        fixed=True,
    )
    max_scale: float = option(
        6.0, "S_max: largest radius of a sampling grid, tokens", POSITIVE, fixed=True
    )
    scale_prior: str = option(
        "multiscale",
        "multiscale: group g starts with the radius (g+1)/G of max_scale; single_scale: all with "
        "half of it",
        one_of(*SCALE_PRIORS),
        fixed=True,
    )
    learn_scale_prior: bool = option(
        True, "whether training changes the scale priors; if not, they are constants", fixed=True
    )
    norm: str = option(
        "rms_norm", "layer_norm has no affine part", one_of(*layers.NORMS), fixed=True
    )
    mlp: str = option(
        "swiglu", "gelu has a hidden width of 4*width, and biases", one_of(*layers.MLPS), fixed=True
    )

    def __post_init__(self):
        super().__post_init__()
        self._require_multiple("width", "num_groups")


class MultiscaleDeformableConv(nnx.Module):
    """Group-wise multiscale deformable convolution (paper section 3.2).

    offsets = (directions + direction prior) * sigmoid(scales + scale prior) * max_scale, in tokens
    and in float32 whatever the compute dtype: bfloat16 would move a coordinate of 31 by 0.1.
    """

    def __init__(self, options: FlowDCNOptions, *, rngs: nnx.Rngs):
        self.options = options
        width, points = options.width, options.num_groups * SAMPLING_POINTS
        zeros = nnx.initializers.zeros_init()
        shared = linear_options(options, rngs)
        self.values = layers.Linear(width, width, bias_init=zeros, **shared)
        self.directions = layers.Linear(
            width, 2 * points, kernel_init=zeros, bias_init=zeros, **shared
        )
        self.scales = layers.Linear(width, points, use_bias=False, kernel_init=zeros, **shared)
        self.weights = layers.Linear(width, points, kernel_init=zeros, **shared)
        self.out = layers.Linear(width, width, bias_init=zeros, **shared)
        prior = jnp.asarray(SCALE_PRIORS[options.scale_prior](options.num_groups))
        self.scale_prior = nnx.Param(prior) if options.learn_scale_prior else None

    def __call__(self, x: Array, max_scale_factor: Array | None = None) -> layers.Branch:
        """x [B,h,w,d] -> [B,h,w,d]; max_scale is multiplied by max_scale_factor [2], (x, y)."""
        options = self.options
        batch, h, w, width = x.shape
        points = (batch, h, w, options.num_groups, SAMPLING_POINTS)
        projections = (self.values, self.directions, self.scales, self.weights)
        values, directions, scales, weights = layers.joint_linear(x, projections)
        if self.scale_prior is None:
            scale_prior = jnp.asarray(SCALE_PRIORS[options.scale_prior](options.num_groups))
        else:
            scale_prior = self.scale_prior[...]
        aggregated = multiscale_deformable_aggregate(
            values.reshape(*points[:-1], width // options.num_groups),
            directions.reshape(*points, 2),
            scales.reshape(points),
            weights.reshape(points),
            scale_prior,
            direction_prior=direction_prior(),
            max_scale=options.max_scale * (1.0 if max_scale_factor is None else max_scale_factor),
            boundary=options.boundary,
        )
        return self.out.apart(aggregated.reshape(x.shape))


class FlowDCNBlock(AdaLNBlock):
    """Tokens are mixed by a convolution, which `make_conv(options, rngs=)` makes."""

    mixer = "conv"

    def __init__(
        self, make_conv: type[nnx.Module], options: NetworkOptions, *, norm: str, mlp: str, rngs
    ):
        width, dtype = options.width, options.compute_dtype
        self.norm1 = layers.NORMS[norm](width, dtype=dtype, rngs=rngs)
        self.conv = make_conv(options, rngs=rngs)
        self.norm2 = layers.NORMS[norm](width, dtype=dtype, rngs=rngs)
        self.mlp = layers.MLPS[mlp](width, **linear_options(options, rngs))
        self.modulation = layers.Linear(width, 6 * width, rngs=rngs, **float32_options(options))


class FlowDCN(VelocityNetwork):
    """The velocity network of the paper.

    `forward_macs` leaves out the sampling itself (4 * K * d a token), as the paper's figures do.
    """

    takes_max_scale_factor = True

    def make_block(self, options: FlowDCNOptions, *, rngs: nnx.Rngs) -> FlowDCNBlock:
        return FlowDCNBlock(
            MultiscaleDeformableConv, options, norm=options.norm, mlp=options.mlp, rngs=rngs
        )
