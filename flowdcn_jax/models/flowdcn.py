"""FlowDCN (arXiv 2410.22655, section 3): a convolutional velocity network for flow matching.

Every token gathers `SAMPLING_POINTS` bilinear samples of its group's values around itself; where
they lie is predicted by the token (directions and scales), so the receptive field follows the
content and no position embedding is needed: any h x w works.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flowdcn_jax.models import layers
from pallas_kernels.deformable_conv import deformable_aggregate

SAMPLING_POINTS = 9  # K: a 3x3 grid


def direction_prior() -> np.ndarray:
    """The frozen prior of the sampling directions: the 3x3 grid on [-1,1]^2, x fastest; [K,2]."""
    ys, xs = np.meshgrid(np.linspace(-1, 1, 3), np.linspace(-1, 1, 3), indexing="ij")
    return np.stack([xs, ys], axis=-1).reshape(SAMPLING_POINTS, 2).astype(np.float32)


def initial_scale_prior(num_groups: int) -> np.ndarray:
    """logit((g+1)/G - 1e-4): group g starts with the radius (g+1)/G of max_scale; [G]."""
    fraction = (np.arange(num_groups) + 1) / num_groups - 1e-4
    return np.log(fraction / (1 - fraction)).astype(np.float32)


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
        self.scale_prior = nnx.Param(jnp.asarray(initial_scale_prior(num_groups)))

    def __call__(self, x: Array, max_scale_factor: Array | None = None) -> Array:
        """x [B,h,w,d] -> [B,h,w,d]; max_scale is multiplied by max_scale_factor [2], (x, y)."""
        batch, h, w, width = x.shape
        points = (batch, h, w, self.num_groups, SAMPLING_POINTS)
        values = self.values(x).reshape(batch, h, w, self.num_groups, width // self.num_groups)
        directions = self.directions(x).reshape(*points, 2).astype(jnp.float32)
        scales = self.scales(x).reshape(points).astype(jnp.float32)
        weights = self.weights(x).reshape(points)

        max_scale = (
            self.max_scale if max_scale_factor is None else self.max_scale * max_scale_factor
        )
        radius = jax.nn.sigmoid(scales + self.scale_prior[...][:, None])
        offsets = (directions + direction_prior()) * radius[..., None] * max_scale
        aggregated = deformable_aggregate(values, offsets, weights, boundary=self.boundary)
        return self.out(aggregated.reshape(x.shape))


class FlowDCNBlock(nnx.Module):
    """x += gate1 * DCN(adaLN(RMSNorm(x))); x += gate2 * SwiGLU(adaLN(RMSNorm(x)))."""

    def __init__(
        self,
        width: int,
        num_groups: int,
        *,
        boundary: str,
        max_scale: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        options = dict(dtype=dtype, rngs=rngs)
        self.norm1 = layers.rms_norm(width, **options)
        self.conv = MultiscaleDeformableConv(
            width, num_groups, boundary=boundary, max_scale=max_scale, **options
        )
        self.norm2 = layers.rms_norm(width, **options)
        self.mlp = layers.SwiGLU(width, **options)
        self.modulation = layers.linear(width, 6 * width, **options)

    def __call__(self, x: Array, condition: Array, max_scale_factor: Array | None = None) -> Array:
        """x [B,h,w,d], condition [B,d], max_scale_factor [2] -> [B,h,w,d]."""
        modulation = self.modulation(nnx.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        mixed = self.conv(layers.modulate(self.norm1(x), shift1, scale1), max_scale_factor)
        x = x + gate1[:, None, None, :] * mixed
        return x + gate2[:, None, None, :] * self.mlp(
            layers.modulate(self.norm2(x), shift2, scale2)
        )


class FinalLayer(nnx.Module):
    """LayerNorm, adaLN and a Linear to p*p*channels; both Linears start at zero."""

    def __init__(self, width: int, out_features: int, *, dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        options = dict(kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.norm = layers.plain_layer_norm(width, dtype=dtype, rngs=rngs)
        self.modulation = layers.linear(width, 2 * width, **options)
        self.linear = layers.linear(width, out_features, **options)

    def __call__(self, x: Array, condition: Array) -> Array:
        shift, scale = jnp.split(self.modulation(nnx.silu(condition)), 2, axis=-1)
        return self.linear(layers.modulate(self.norm(x), shift, scale))


class FlowDCN(nnx.Module):
    """The velocity network.

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
    ):
        self.width = width
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.dtype = dtype
        self.remat = remat
        patch_features = patch_size**2 * in_channels
        out_features = patch_features * (2 if learn_sigma else 1)
        options = dict(dtype=dtype, rngs=rngs)
        self.stem = layers.linear(
            patch_features,
            width,
            kernel_init=nnx.initializers.xavier_uniform(),
            bias_init=nnx.initializers.zeros_init(),
            **options,
        )
        self.time_embedder = layers.TimestepEmbedder(width, **options)
        self.class_embedder = layers.ClassEmbedder(num_classes, width, **options)
        self.blocks = nnx.List(
            FlowDCNBlock(width, num_groups, boundary=boundary, max_scale=max_scale, **options)
            for _ in range(depth)
        )
        self.final = FinalLayer(width, out_features, **options)

    def __call__(
        self, x: Array, t: Array, y: Array, max_scale_factor: Array | None = None
    ) -> Array:
        """Velocity [B,H,W,C] (float32) at x [B,H,W,C], time t [B] in [0,1], class y [B] (integers).

        max_scale_factor [depth,2] multiplies max_scale in each block along x and y: see
        `flowdcn_jax.models.resolution`.

        Raises:
            ValueError: a shape that does not fit, or a side that the patch size does not divide.
        """
        self._check(x, t, y)
        tokens = self.stem(layers.patchify(x.astype(self.dtype), self.patch_size))
        condition = self.time_embedder(t) + self.class_embedder(y)
        apply = nnx.remat(lambda block, *args: block(*args)) if self.remat else _apply_block
        factors = [None] * len(self.blocks) if max_scale_factor is None else max_scale_factor
        for block, factor in zip(self.blocks, factors, strict=True):
            tokens = apply(block, tokens, condition, factor)
        out = layers.unpatchify(self.final(tokens, condition), self.patch_size)
        return out[..., : self.in_channels].astype(jnp.float32)

    def forward_macs(self, height: int, width: int) -> int:
        """Multiply-adds of the matrix products for one input of height x width (latent pixels).

        The sampling itself (4 * K * d a token) is left out, as in the paper's figures.
        """
        tokens = (height // self.patch_size) * (width // self.patch_size)
        once = {"time_embedder", "modulation"}  # act on the condition, not on the tokens
        total = 0
        for path, module in nnx.iter_modules(self):
            if isinstance(module, nnx.Linear):
                uses = 1 if once.intersection(path) else tokens
                total += uses * module.in_features * module.out_features
        return total

    def _check(self, x: Array, t: Array, y: Array) -> None:
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"x has shape {x.shape}; expected [B, H, W, {self.in_channels}]")
        if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size or 0 in x.shape[1:3]:
            raise ValueError(
                f"x is {x.shape[1]}x{x.shape[2]}; both sides must be positive multiples of the "
                f"patch size {self.patch_size}"
            )
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"t {t.shape} and y {y.shape} must both have shape {x.shape[:1]}")
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(f"y has dtype {y.dtype}; expected integers")


def _apply_block(block: FlowDCNBlock, *args) -> Array:
    return block(*args)
