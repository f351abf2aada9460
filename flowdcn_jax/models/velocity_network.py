"""What all models share: patches in, adaLN blocks conditioned on time and class, patches out.

The models differ in their blocks, and in whether tokens are told their positions.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.models import layers


class AdaLNBlock(nnx.Module):
    """x += gate1 * mix(adaLN(norm1(x))); x += gate2 * mlp(adaLN(norm2(x))).

    A block defines norm1, norm2, mlp and modulation (a Linear to 6 * width), and `mix`, the only
    part in which tokens see one another.
    """

    def mix(self, x: Array, *options) -> Array:
        """[B,h,w,d] -> [B,h,w,d]; a model may give its blocks options at each call."""
        raise NotImplementedError

    def __call__(self, x: Array, condition: Array, *mix_options) -> Array:
        """x [B,h,w,d], condition [B,d] -> [B,h,w,d]."""
        modulation = self.modulation(nnx.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        mixed = self.mix(layers.modulate(self.norm1(x), shift1, scale1), *mix_options)
        x = x + gate1[:, None, None, :] * mixed
        return x + gate2[:, None, None, :] * self.mlp(
            layers.modulate(self.norm2(x), shift2, scale2)
        )


class FinalLayer(nnx.Module):
    """LayerNorm, adaLN and a Linear to p*p*channels; both Linears start at zero."""

    def __init__(self, width: int, out_features: int, *, dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        options = dict(kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(width, dtype=dtype, rngs=rngs)
        self.modulation = layers.linear(width, 2 * width, **options)
        self.linear = layers.linear(width, out_features, **options)

    def __call__(self, x: Array, condition: Array) -> Array:
        shift, scale = jnp.split(self.modulation(nnx.silu(condition)), 2, axis=-1)
        return self.linear(layers.modulate(self.norm(x), shift, scale))


class VelocityNetwork(nnx.Module):
    """The velocity network around its blocks.

    Args:
        make_block: makes a block, an AdaLNBlock of `width`; called `depth` times.
        linear: makes the Linears that have no initial values of their own.
        The others are the arguments that all models share; FlowDCN describes them.
    """

    def __init__(
        self,
        make_block: Callable[[], AdaLNBlock],
        *,
        width: int,
        depth: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        learn_sigma: bool,
        dtype,
        remat: bool,
        rngs: nnx.Rngs,
        linear=layers.linear,
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
        self.stem = layers.xavier_linear(patch_features, width, **options)
        self.time_embedder = layers.TimestepEmbedder(width, linear=linear, **options)
        self.class_embedder = layers.ClassEmbedder(num_classes, width, **options)
        self.blocks = nnx.List(make_block() for _ in range(depth))
        self.final = FinalLayer(width, out_features, **options)

    def __call__(self, x: Array, t: Array, y: Array) -> Array:
        """Velocity [B,H,W,C] (float32) at x [B,H,W,C], time t [B] in [0,1], class y [B] (integers).

        Raises:
            ValueError: a shape that does not fit, or a side that the patch size does not divide.
        """
        return self.velocity(x, t, y, ((),) * len(self.blocks))

    def velocity(self, x: Array, t: Array, y: Array, mix_options) -> Array:
        """`__call__`, with a tuple of options for each block's `mix`."""
        self._check(x, t, y)
        tokens = self.embed(x)
        condition = self.time_embedder(t) + self.class_embedder(y)
        apply = nnx.remat(_apply_block) if self.remat else _apply_block
        for block, options in zip(self.blocks, mix_options, strict=True):
            tokens = apply(block, tokens, condition, *options)
        out = layers.unpatchify(self.final(tokens, condition), self.patch_size)
        return out[..., : self.in_channels].astype(jnp.float32)

    def embed(self, x: Array) -> Array:
        """x [B,H,W,C] -> tokens [B,H/p,W/p,d]."""
        return self.stem(layers.patchify(x.astype(self.dtype), self.patch_size))

    def forward_macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass over one input of height x width (latent pixels).

        Of the Linears and convolutions, as published figures count: elementwise work, norms and the
        lookup of the class are left out, and convolutions count their padding.
        """
        tokens = (height // self.patch_size) * (width // self.patch_size)
        once = {"time_embedder", "modulation"}  # act on the condition, not on the tokens
        total = 0
        for path, module in nnx.iter_modules(self):
            if isinstance(module, nnx.Linear | nnx.Conv):
                uses = 1 if once.intersection(path) else tokens
                total += uses * math.prod(module.kernel.shape)
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


def _apply_block(block: AdaLNBlock, *args) -> Array:
    return block(*args)
