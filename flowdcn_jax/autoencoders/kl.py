"""The autoencoder of Stable Diffusion (Rombach et al., arXiv 2112.10752), diffusers' AutoencoderKL.

Modules and attributes have the publisher's names, so that a parameter's path here is its tensor's
name there.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flowdcn_jax.autoencoders.layers import Layers, upsample
from flowdcn_jax.autoencoders.weights import AutoencoderError, check_config, tensor_name
from flowdcn_jax.precision import matmul_precision

NORM_EPSILON = 1e-6
NORM_GROUPS = 32  # where no config.json says otherwise
LOG_VARIANCE_RANGE = (-30.0, 20.0)

_OLD_ATTENTION_NAMES = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}
# What config.json may say that this module is not.
_FIXED_CONFIG = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "latents_mean": None,
    "latents_std": None,
}


class KLSizes(NamedTuple):
    """What the AutoencoderKL architecture leaves open."""

    image_channels: int
    latent_channels: int
    widths: tuple[int, ...]  # channels of each resolution, the largest resolution first
    layers_per_block: int  # residual blocks a resolution in the encoder; the decoder has one more
    norm_groups: int

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.widths) - 1)


class ResnetBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution of x where channels change."""

    def __init__(self, in_features: int, out_features: int, layers: Layers):
        self.norm1 = layers.group_norm(in_features)
        self.conv1 = layers.conv(in_features, out_features)
        self.norm2 = layers.group_norm(out_features)
        self.conv2 = layers.conv(out_features, out_features)
        self.conv_shortcut = (
            None if in_features == out_features else layers.conv(in_features, out_features, 1)
        )

    def __call__(self, x: Array) -> Array:
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Single-head self-attention over all places of the feature map, with a residual."""

    def __init__(self, features: int, layers: Layers):
        self.group_norm = layers.group_norm(features)
        self.to_q = layers.linear(features, features)
        self.to_k = layers.linear(features, features)
        self.to_v = layers.linear(features, features)
        self.to_out = nnx.List([layers.linear(features, features)])
        self.dtype = layers.dtype

    def __call__(self, x: Array) -> Array:
        """x [B,h,w,C] -> [B,h,w,C]; logits and softmax are float32."""
        batch, _, _, features = x.shape
        tokens = self.group_norm(x).reshape(batch, -1, features)
        precision = matmul_precision(self.dtype)
        logits = jnp.einsum(
            "bqc,bkc->bqk",
            self.to_q(tokens),
            self.to_k(tokens),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        weights = jax.nn.softmax(logits * features**-0.5, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bqk,bkc->bqc", weights, self.to_v(tokens), precision=precision)
        return x + self.to_out[0](mixed).reshape(x.shape)


class Downsample(nnx.Module):
    """Half of both sides by a 3x3 convolution, padded on the right and at the bottom only."""

    def __init__(self, features: int, layers: Layers):
        self.conv = layers.conv(features, features, stride=2, padding=(0, 1))

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice both sides by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, features: int, layers: Layers):
        self.conv = layers.conv(features, features)

    def __call__(self, x: Array) -> Array:
        return self.conv(upsample(x))


def resnet_blocks(in_features: int, features: int, count: int, layers: Layers) -> nnx.List:
    """`count` residual blocks; the first goes from in_features to features."""
    inputs = [in_features] + [features] * (count - 1)
    return nnx.List([ResnetBlock(width, features, layers) for width in inputs])


class DownBlock(nnx.Module):
    """Residual blocks, then half the resolution unless `last`."""

    def __init__(self, in_features: int, features: int, count: int, layers: Layers, *, last: bool):
        self.resnets = resnet_blocks(in_features, features, count, layers)
        self.downsamplers = nnx.List([] if last else [Downsample(features, layers)])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """Residual blocks, then twice the resolution unless `last`."""

    def __init__(self, in_features: int, features: int, count: int, layers: Layers, *, last: bool):
        self.resnets = resnet_blocks(in_features, features, count, layers)
        self.upsamplers = nnx.List([] if last else [Upsample(features, layers)])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, features: int, layers: Layers):
        self.resnets = resnet_blocks(features, features, 2, layers)
        self.attentions = nnx.List([AttentionBlock(features, layers)])

    def __call__(self, x: Array) -> Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nnx.Module):
    """Images [B,H,W,3] -> twice the latent channels, float32 [B,H/f,W/f,2C], before quant_conv."""

    def __init__(self, sizes: KLSizes, layers: Layers):
        widths, last = sizes.widths, len(sizes.widths) - 1
        self.conv_in = layers.conv(sizes.image_channels, widths[0])
        self.down_blocks = nnx.List(
            DownBlock(before, width, sizes.layers_per_block, layers, last=level == last)
            for level, (before, width) in enumerate(
                zip(widths[:1] + widths[:-1], widths, strict=True)
            )
        )
        self.mid_block = MidBlock(widths[-1], layers)
        self.conv_norm_out = layers.group_norm(widths[-1])
        self.conv_out = layers.exact.conv(widths[-1], 2 * sizes.latent_channels)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents [B,h,w,C], after post_quant_conv, -> images, float32 [B,f h,f w,3]."""

    def __init__(self, sizes: KLSizes, layers: Layers):
        widths, last = sizes.widths[::-1], len(sizes.widths) - 1
        self.conv_in = layers.conv(sizes.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], layers)
        self.up_blocks = nnx.List(
            UpBlock(before, width, sizes.layers_per_block + 1, layers, last=level == last)
            for level, (before, width) in enumerate(
                zip(widths[:1] + widths[:-1], widths, strict=True)
            )
        )
        self.conv_norm_out = layers.group_norm(widths[-1])
        self.conv_out = layers.exact.conv(widths[-1], sizes.image_channels)

    def __call__(self, x: Array) -> Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images to the mean and standard deviation of their latents, and latents to images.

    What leaves the network is computed in float32, also where `dtype` is narrower: the latents of
    a picture reach 5 and more, and their standard deviation is far below bfloat16's steps there.
    """

    def __init__(self, sizes: KLSizes, *, dtype, rngs: nnx.Rngs):
        channels = sizes.latent_channels
        layers = Layers(dtype, rngs, norm_groups=sizes.norm_groups, norm_epsilon=NORM_EPSILON)
        self.encoder = Encoder(sizes, layers)
        self.quant_conv = layers.exact.conv(2 * channels, 2 * channels, 1)
        self.post_quant_conv = layers.exact.conv(channels, channels, 1)
        self.decoder = Decoder(sizes, layers)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """[B,H,W,3] in [-1,1] -> (mean, std), unscaled latents [B,H/f,W/f,C]."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    def decode(self, latents: Array) -> Array:
        """Unscaled latents [B,h,w,C] -> [B,f h,f w,3], near [-1,1] but not clipped."""
        return self.decoder(self.post_quant_conv(latents))


_LDM_NAMES = (
    (r"^(encoder|decoder)\.(down|up)\.(\d+)\.block\.", r"\1.\2_blocks.\3.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


def old_tensor_name(path: tuple) -> str:
    """The name in files of older versions of diffusers, such as sd-vae-ft-ema's."""
    name = tensor_name(path)
    for new, old in _OLD_ATTENTION_NAMES.items():
        name = name.replace(new, old)
    return name


def naming(tensors: Mapping[str, np.ndarray]) -> Callable[[tuple], str]:
    """The one of the two namings that the tensors follow."""
    return old_tensor_name if any(".query." in name for name in tensors) else tensor_name


def from_ldm(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Tensors under diffusers' names, of those under the names of latent-diffusion's own code.

    They may be a part of a whole model, named first_stage_model.  Others are given back as they
    are.
    """
    whole = "first_stage_model."
    if any(name.startswith(whole) for name in tensors):
        tensors = {
            name.removeprefix(whole): tensor
            for name, tensor in tensors.items()
            if name.startswith(whole)
        }
    ups = {match[1] for match in map(re.compile(r"decoder\.up\.(\d+)\.").match, tensors) if match}
    if not ups:
        return tensors
    renamed, place = {}, functools.partial(_ldm_up_block, count=len(ups))
    for name, tensor in tensors.items():
        if name.startswith(("loss.", "model_ema.")):
            continue
        for pattern, replacement in _LDM_NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^decoder\.up_blocks\.(\d+)", place, name)
        renamed[name] = tensor
    return renamed


def _ldm_up_block(match: re.Match, *, count: int) -> str:
    """latent-diffusion counts them upwards from the image, diffusers towards it."""
    return f"decoder.up_blocks.{count - 1 - int(match[1])}"


def find_sizes(tensors: Mapping[str, np.ndarray], config: Mapping, source: str) -> KLSizes:
    """The sizes that the tensors show and config.json (empty: its defaults) confirms.

    Raises:
        AutoencoderError: another architecture, or config.json says something else; the message
            names `source`, where they are from.
    """

    def size(name: str, axis: int) -> int:
        if name not in tensors or tensors[name].ndim != 4:
            raise AutoencoderError(f"{source} is no AutoencoderKL: it has no convolution {name!r}")
        return tensors[name].shape[axis]

    def count(name: str) -> int:
        return next(number for number in itertools.count() if name.format(number) not in tensors)

    stages = count("encoder.down_blocks.{}.resnets.0.conv1.weight")
    sizes = KLSizes(
        image_channels=size("encoder.conv_in.weight", 1),
        latent_channels=size("decoder.conv_in.weight", 1),
        widths=tuple(
            size(f"encoder.down_blocks.{stage}.resnets.0.conv1.weight", 0)
            for stage in range(max(1, stages))
        ),
        layers_per_block=count("encoder.down_blocks.0.resnets.{}.conv1.weight"),
        norm_groups=config.get("norm_num_groups", NORM_GROUPS),
    )
    expected = _FIXED_CONFIG | {
        "latent_channels": sizes.latent_channels,
        "block_out_channels": list(sizes.widths),
        "layers_per_block": sizes.layers_per_block,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
    }
    check_config(config, expected, source)
    if any(width % sizes.norm_groups for width in sizes.widths):
        raise AutoencoderError(
            f"{source} has widths {sizes.widths}; expected multiples of the {sizes.norm_groups} "
            "groups of its norms (norm_num_groups in config.json)"
        )
    return sizes
