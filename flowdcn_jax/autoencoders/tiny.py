"""The TAESD family of tiny autoencoders (github.com/madebyollin/taesd): TAESD, TAEF1, TAEF2.

They imitate the big autoencoders of Stable Diffusion, FLUX.1 and FLUX.2 in the space in which those
diffusion models work: scaled already, and without a variance. The layers stand in the order of the
publisher's taesd.py, so that their numbers are those of its tensors.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flowdcn_jax.autoencoders.layers import Layers, upsample
from flowdcn_jax.autoencoders.weights import AutoencoderError, check_config, tensor_name

LATENT_LIMIT = 3.0  # the decoder squashes latents to +-3
MIDBLOCK_NORM_GROUPS = 4
MIDBLOCK_NORM_EPSILON = 1e-5
MIDBLOCK_EXPANSION = 4

# What config.json may say that this module is not.
_FIXED_CONFIG = {
    "act_fn": "relu",
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "upsampling_scaling_factor": 2,
}


class TinySizes(NamedTuple):
    """What the architecture leaves open."""

    image_channels: int
    latent_channels: int
    width: int
    midblock_norm: bool  # GroupNorm branches at the lowest resolution (TAEF2)

    @property
    def downsampling(self) -> int:
        return 2**3  # three convolutions halve the sides


class Squash(nnx.Module):
    """A smooth clip to +-LATENT_LIMIT."""

    def __call__(self, x: Array) -> Array:
        return jnp.tanh(x / LATENT_LIMIT) * LATENT_LIMIT


def norm_branch(width: int, layers: Layers) -> nnx.Sequential:
    """What TAEF2's lowest resolution adds to a block's input; it sees the whole feature map."""
    hidden = MIDBLOCK_EXPANSION * width
    return nnx.Sequential(
        layers.conv(width, hidden, 1, use_bias=False),
        layers.group_norm(hidden),
        nnx.relu,
        layers.conv(hidden, width, 1, use_bias=False),
    )


class Block(nnx.Module):
    """relu(x + three convolutions of x), after x += norm_branch(x) if `norm`."""

    def __init__(self, width: int, layers: Layers, *, norm: bool = False):
        self.pool = norm_branch(width, layers) if norm else None
        self.conv = nnx.Sequential(
            layers.conv(width, width),
            nnx.relu,
            layers.conv(width, width),
            nnx.relu,
            layers.conv(width, width),
        )

    def __call__(self, x: Array) -> Array:
        if self.pool is not None:
            x = x + self.pool(x)
        return nnx.relu(self.conv(x) + x)


def encoder(sizes: TinySizes, layers: Layers) -> nnx.Sequential:
    """Images [B,H,W,3] in [0,1] -> latents [B,H/8,W/8,C], float32."""
    width = sizes.width

    def halve_and_blocks(norm: bool = False) -> list:
        halve = layers.conv(width, width, stride=2, use_bias=False)
        return [halve, *(Block(width, layers, norm=norm) for _ in range(3))]

    return nnx.Sequential(
        layers.conv(sizes.image_channels, width),
        Block(width, layers),
        *halve_and_blocks(),
        *halve_and_blocks(),
        *halve_and_blocks(norm=sizes.midblock_norm),
        layers.exact.conv(width, sizes.latent_channels),
    )


def decoder(sizes: TinySizes, layers: Layers) -> nnx.Sequential:
    """Latents [B,h,w,C] -> images [B,8h,8w,3], float32 near [0,1]."""
    width = sizes.width

    def blocks_and_double(norm: bool = False) -> list:
        blocks = [Block(width, layers, norm=norm) for _ in range(3)]
        return [*blocks, upsample, layers.conv(width, width, use_bias=False)]

    return nnx.Sequential(
        Squash(),
        layers.conv(sizes.latent_channels, width),
        nnx.relu,
        *blocks_and_double(norm=sizes.midblock_norm),
        *blocks_and_double(),
        *blocks_and_double(),
        Block(width, layers),
        layers.exact.conv(width, sizes.image_channels),
    )


class AutoencoderTiny(nnx.Module):
    """Images to latents and back; deterministic."""

    def __init__(self, sizes: TinySizes, *, dtype, rngs: nnx.Rngs):
        layers = Layers(
            dtype, rngs, norm_groups=MIDBLOCK_NORM_GROUPS, norm_epsilon=MIDBLOCK_NORM_EPSILON
        )
        self.encoder = encoder(sizes, layers)
        self.decoder = decoder(sizes, layers)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """[B,H,W,3] in [-1,1] -> (latents [B,H/8,W/8,C], zeros)."""
        latents = self.encoder(images * 0.5 + 0.5)
        return latents, jnp.zeros_like(latents)

    def decode(self, latents: Array) -> Array:
        """Latents [B,h,w,C] -> [B,8h,8w,3], near [-1,1] but not clipped."""
        return self.decoder(latents) * 2 - 1


def taesd_name(path: tuple) -> str:
    """The name in taesd.py of the parameter at `path`, after "encoder." or "decoder."."""
    return tensor_name(tuple(part for part in path if part != "layers"))


def diffusers_name(path: tuple) -> str:
    """The name in diffusers' AutoencoderTiny, whose decoder does not count the squashing."""
    half, index, rest = taesd_name(path).split(".", 2)
    return f"{half}.layers.{int(index) - (half == 'decoder')}.{rest}"


def naming(tensors: Mapping[str, np.ndarray]) -> Callable[[tuple], str]:
    """The one of the two namings that the tensors follow."""
    return diffusers_name if any(".layers." in name for name in tensors) else taesd_name


def find_sizes(tensors: Mapping[str, np.ndarray], config: Mapping, source: str) -> TinySizes:
    """The sizes that the tensors show and config.json (empty: its defaults) confirms.

    Raises:
        AutoencoderError: another architecture, or config.json says something else; the message
            names `source`, where they are from.
    """
    tensor_name = naming(tensors)

    def size(layer: int, axis: int) -> int:
        name = tensor_name(("encoder", "layers", layer, "kernel"))
        if name not in tensors or tensors[name].ndim != 4:
            raise AutoencoderError(
                f"{source} is no autoencoder of the TAESD family: it has no convolution {name!r}"
            )
        return tensors[name].shape[axis]

    sizes = TinySizes(
        image_channels=size(0, 1),
        latent_channels=size(14, 0),
        width=size(0, 0),
        midblock_norm=any(".pool." in name for name in tensors),
    )
    expected = _FIXED_CONFIG | {
        "latent_channels": sizes.latent_channels,
        "encoder_block_out_channels": [sizes.width] * 4,
        "decoder_block_out_channels": [sizes.width] * 4,
    }
    check_config(config, expected, source)
    return sizes
