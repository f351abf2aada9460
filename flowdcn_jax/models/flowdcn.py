"""FlowDCN (arXiv 2410.22655, section 3): a convolutional velocity network for flow matching.

Every token gathers `SAMPLING_POINTS` bilinear samples of its group's values around itself; where
they lie is predicted by the token (directions and scales), so the receptive field follows the
content and no position embedding is needed: any h x w works.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flowdcn_jax.models import layers
from flowdcn_jax.models.velocity_network import AdaLNBlock, VelocityNetwork
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


class MultiscaleDeformableConv(nnx.Module):
    """Group-wise multiscale deformable convolution (paper section 3.2).

    offsets = (directions + direction prior) * sigmoid(scales + scale prior) * max_scale, in tokens
    and in float32 whatever the compute dtype: bfloat16 would move a coordinate of 31 by 0.1.
    """

    def __init__(
        self,
        width: int,
        num_groups: int,
        *,
        boundary: str,
        max_scale: float,
        scale_prior: str,
        learn_scale_prior: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        zeros = nnx.initializers.zeros_init()
        points = num_groups * SAMPLING_POINTS
        self.num_groups = num_groups
        self.boundary = boundary
        self.max_scale = max_scale
        options = dict(dtype=dtype, rngs=rngs)
        self.values = layers.linear(width, width, bias_init=zeros, **options)
        self.directions = layers.linear(
            width, 2 * points, kernel_init=zeros, bias_init=zeros, **options
        )
        self.scales = layers.linear(width, points, use_bias=False, kernel_init=zeros, **options)
        self.weights = layers.linear(width, points, kernel_init=zeros, **options)
        self.out = layers.linear(width, width, bias_init=zeros, **options)
        self.initial_prior = layers.choose("scale_prior", scale_prior, SCALE_PRIORS)
        prior = self.initial_prior(num_groups)
        self.scale_prior = nnx.Param(jnp.asarray(prior)) if learn_scale_prior else None

    def __call__(self, x: Array, max_scale_factor: Array | None = None) -> Array:
        """x [B,h,w,d] -> [B,h,w,d]; max_scale is multiplied by max_scale_factor [2], (x, y)."""
        batch, h, w, width = x.shape
        points = (batch, h, w, self.num_groups, SAMPLING_POINTS)
        values = self.values(x).reshape(batch, h, w, self.num_groups, width // self.num_groups)
        prior = self.initial_prior(self.num_groups)
        aggregated = multiscale_deformable_aggregate(
            values,
            self.directions(x).reshape(*points, 2),
            self.scales(x).reshape(points),
            self.weights(x).reshape(points),
            jnp.asarray(prior) if self.scale_prior is None else self.scale_prior[...],
            direction_prior=direction_prior(),
            max_scale=self.max_scale * (1.0 if max_scale_factor is None else max_scale_factor),
            boundary=self.boundary,
        )
        return self.out(aggregated.reshape(x.shape))


class FlowDCNBlock(AdaLNBlock):
    """Tokens are mixed by a convolution, which `make_conv(dtype=, rngs=)` makes."""

    def __init__(
        self, width: int, make_conv: Callable, *, norm: str, mlp: str, dtype, rngs: nnx.Rngs
    ):
        options = dict(dtype=dtype, rngs=rngs)
        make_norm = layers.choose("norm", norm, layers.NORMS)
        make_mlp = layers.choose("mlp", mlp, layers.MLPS)
        self.norm1 = make_norm(width, **options)
        self.conv = make_conv(**options)
        self.norm2 = make_norm(width, **options)
        self.mlp = make_mlp(width, **options)
        self.modulation = layers.linear(width, 6 * width, **options)

    def mix(self, x: Array, *options) -> Array:
        return self.conv(x, *options)


class FlowDCN(VelocityNetwork):
    """The velocity network of the paper; the options that have defaults are its ablations.

    `forward_macs` leaves out the sampling itself (4 * K * d a token), as the paper's figures do.

    Args:
        width: d, channels of a token; a multiple of num_groups.
        depth: number of blocks.
        num_groups: G, groups of the deformable convolution.
        patch_size: p, side of a token's patch.
        in_channels: channels of the input, and of the velocity.
        num_classes: labels are 0 .. num_classes - 1; the label `num_classes` means "no class".
        learn_sigma: predict 2 * in_channels and use the first half, as the released weights do.
        boundary: "zeros" (textbook) or "truncate" (what the released weights were trained with).
        max_scale: S_max, the largest radius of a sampling grid, in tokens.
        dtype: compute dtype; parameters are float32.
        remat: recompute each block in the backward pass instead of keeping its activations.
        rngs: source of the initial values.
        norm: "rms_norm", or "layer_norm" (without an affine part).
        mlp: "swiglu", or "gelu" (hidden width 4d, with biases).
        scale_prior: "multiscale" (group g starts with the radius (g+1)/G of max_scale), or
            "single_scale" (every group starts with half of max_scale).
        learn_scale_prior: whether training changes the scale priors; if not, they are constants.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_groups: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        learn_sigma: bool,
        boundary: str,
        max_scale: float,
        dtype,
        remat: bool,
        rngs: nnx.Rngs,
        norm: str = "rms_norm",
        mlp: str = "swiglu",
        scale_prior: str = "multiscale",
        learn_scale_prior: bool = True,
    ):
        make_conv = functools.partial(
            MultiscaleDeformableConv,
            width,
            num_groups,
            boundary=boundary,
            max_scale=max_scale,
            scale_prior=scale_prior,
            learn_scale_prior=learn_scale_prior,
        )
        super().__init__(
            lambda: FlowDCNBlock(width, make_conv, norm=norm, mlp=mlp, dtype=dtype, rngs=rngs),
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

    def __call__(
        self, x: Array, t: Array, y: Array, max_scale_factor: Array | None = None
    ) -> Array:
        """Velocity [B,H,W,C] (float32) at x [B,H,W,C], time t [B] in [0,1], class y [B] (integers).

        max_scale_factor [depth,2] multiplies max_scale in each block along x and y: see
        `flowdcn_jax.models.resolution`.

        Raises:
            ValueError: a shape that does not fit, or a side that the patch size does not divide.
        """
        factors = [None] * len(self.blocks) if max_scale_factor is None else max_scale_factor
        return self.velocity(x, t, y, [(factor,) for factor in factors])
