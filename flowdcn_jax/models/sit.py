"""SiT (arXiv 2401.08740), the transformer that FlowDCN is compared with, and DiT's network too.

Sequences are kept as grids [B,h,w,d], as everywhere here. Positions are told by sinusoids of the
integer coordinates, so any h x w works; sizes beyond those of training are extrapolated.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flowdcn_jax.errors import ConfigError
from flowdcn_jax.models import layers
from flowdcn_jax.models.velocity_network import (
    AdaLNBlock,
    NetworkOptions,
    VelocityNetwork,
    float32_options,
    linear_options,
)
from flowdcn_jax.options import at_least, one_of, option
from pallas_kernels.devices import why_no_nvidia_kernels

POSITION_MAX_PERIOD = 10_000.0
CUDNN_MAX_HEAD_DIM = 128  # of cuDNN's fused attention on every GPU since Ampere


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiTOptions(NetworkOptions):
    """config.model of a SiT or DiT; with rms_norm and swiglu it is the paper's SiT+."""

    num_heads: int = option(6, "heads of the attention; divides width", at_least(1), fixed=True)
    norm: str = option(
        "layer_norm", "layer_norm has no affine part", one_of(*layers.NORMS), fixed=True
    )
    mlp: str = option(
        "gelu", "gelu has a hidden width of 4*width, and biases", one_of(*layers.MLPS), fixed=True
    )
    attention: str = option(
        "auto", "auto: cuDNN's where that serves; xla: XLA's everywhere", one_of("auto", "xla")
    )

    def __post_init__(self):
        super().__post_init__()
        self._require_multiple("width", "num_heads")
        if self.width % 4:
            raise ConfigError(
                f"config.model.width is {self.width}; expected a multiple of 4, for the position "
                "embedding"
            )


def position_embedding(h: int, w: int, width: int) -> np.ndarray:
    """Sinusoids of each token's column (first half of the channels) and row: [h,w,width] float32.

    Each half holds the sines, then the cosines, of width/4 frequencies from 1 down towards 1/10000.
    Coordinates are integers whatever the size, as in the released models, of each of which this is
    the constant: a 512x512 model's top left quarter is that of a 256x256 model. For a size that a
    model was not trained at it extrapolates: nothing is rescaled.
    """
    frequencies = POSITION_MAX_PERIOD ** -(np.arange(width // 4) / (width // 4))

    def sinusoids(coordinates):
        angles = coordinates[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    columns = np.broadcast_to(sinusoids(np.arange(w))[None, :], (h, w, width // 2))
    rows = np.broadcast_to(sinusoids(np.arange(h))[:, None], (h, w, width // 2))
    return np.concatenate([columns, rows], axis=-1).astype(np.float32)


def attention_implementation(dtype, head_dim: int) -> str:
    """What jax.nn.dot_product_attention is asked for: "cudnn" or "xla".

    cuDNN's fused kernel, which never holds the tokens x tokens matrix, for the 16-bit types where
    the default device is an NVIDIA GPU of compute capability 8.0 or higher, and the head sizes that
    it takes (multiples of 8 up to 128, which all published models are within). XLA otherwise: cuDNN
    has no float32, and no other platform has cuDNN.

    The gradient of cuDNN's kernel adds its terms in any order, unless XLA is told to exclude such
    operations (XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true). It has no derivative along a
    direction, which XLA's has: `models.differentiable_along`.
    """
    fits = head_dim % 8 == 0 and head_dim <= CUDNN_MAX_HEAD_DIM
    cudnn = fits and dtype in (jnp.bfloat16, jnp.float16) and why_no_nvidia_kernels() is None
    return "cudnn" if cudnn else "xla"


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens of the grid; the softmax is float32."""

    def __init__(self, width: int, num_heads: int, implementation: str, **linear_options):
        self.num_heads, self.implementation = num_heads, implementation
        self.qkv = layers.xavier_linear(width, 3 * width, **linear_options)
        self.out = layers.xavier_linear(width, width, **linear_options)

    def __call__(self, x: Array) -> Array:
        """x [B,h,w,d] -> [B,h,w,d]."""
        batch, h, w, width = x.shape
        head_dim = width // self.num_heads
        qkv = self.qkv(x).reshape(batch, h * w, 3, self.num_heads, head_dim)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        # The function takes no precision; without this, GPUs round float32 operands to TF32.
        precision = "highest" if qkv.dtype == jnp.float32 else None
        implementation = self.implementation
        if implementation == "auto":
            implementation = attention_implementation(qkv.dtype, head_dim)
        with jax.default_matmul_precision(precision):
            mixed = jax.nn.dot_product_attention(query, key, value, implementation=implementation)
        return self.out.apart(mixed.reshape(x.shape))


class SiTBlock(AdaLNBlock):
    """Tokens are mixed by attention; the modulation starts at zero: the block changes nothing."""

    mixer = "attention"

    def __init__(self, options: SiTOptions, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        width, shared = options.width, linear_options(options, rngs)
        make_norm = functools.partial(
            layers.NORMS[options.norm], width, dtype=options.compute_dtype, rngs=rngs
        )
        self.norm1 = make_norm()
        self.attention = Attention(width, options.num_heads, options.attention, **shared)
        self.norm2 = make_norm()
        self.mlp = layers.MLPS[options.mlp](width, linear=layers.xavier_linear, **shared)
        self.modulation = layers.Linear(
            width,
            6 * width,
            kernel_init=zeros,
            bias_init=zeros,
            rngs=rngs,
            **float32_options(options),
        )


class SiT(VelocityNetwork):
    """SiT with adaLN-zero blocks."""

    def __init__(self, options: SiTOptions, *, rngs: nnx.Rngs):
        super().__init__(options, rngs=rngs, linear=layers.xavier_linear)

    def make_block(self, options: SiTOptions, *, rngs: nnx.Rngs) -> SiTBlock:
        return SiTBlock(options, rngs=rngs)

    def embed(self, x: Array) -> Array:
        tokens = super().embed(x)
        return tokens + position_embedding(*tokens.shape[1:]).astype(tokens.dtype)

    def forward_macs(self, height: int, width: int) -> int:
        """As of the other models, and attention's two products of tokens by tokens."""
        options = self.options
        tokens = (height // options.patch_size) * (width // options.patch_size)
        attention = options.depth * 2 * tokens**2 * options.width
        return super().forward_macs(height, width) + attention
