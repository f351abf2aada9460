"""SiT (arXiv 2401.08740), the transformer that FlowDCN is compared with, and DiT's network too.

Sequences are kept as grids [B,h,w,d], as everywhere here. Positions are told by sinusoids of the
integer coordinates, so any h x w works; sizes beyond those of training are extrapolated.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flowdcn_jax.models import layers
from flowdcn_jax.models.velocity_network import AdaLNBlock, VelocityNetwork
from pallas_kernels.devices import why_no_nvidia_kernels

POSITION_MAX_PERIOD = 10_000.0
CUDNN_MAX_HEAD_DIM = 128  # of cuDNN's fused attention on every GPU since Ampere


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
    operations (XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true).
    """
    fits = head_dim % 8 == 0 and head_dim <= CUDNN_MAX_HEAD_DIM
    cudnn = fits and dtype in (jnp.bfloat16, jnp.float16) and why_no_nvidia_kernels() is None
    return "cudnn" if cudnn else "xla"


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens of the grid; the softmax is float32."""

    def __init__(self, width: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = layers.xavier_linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = layers.xavier_linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [B,h,w,d] -> [B,h,w,d]."""
        batch, h, w, width = x.shape
        head_dim = width // self.num_heads
        qkv = self.qkv(x).reshape(batch, h * w, 3, self.num_heads, head_dim)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        # The function takes no precision; without this, GPUs round float32 operands to TF32.
        precision = "highest" if qkv.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision):
            mixed = jax.nn.dot_product_attention(
                query,
                key,
                value,
                implementation=attention_implementation(qkv.dtype, head_dim),
            )
        return self.out(mixed.reshape(x.shape))


class SiTBlock(AdaLNBlock):
    """Tokens are mixed by attention; the modulation starts at zero: the block changes nothing."""

    def __init__(self, width: int, num_heads: int, *, norm: str, mlp: str, dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        options = dict(dtype=dtype, rngs=rngs)
        make_norm = layers.choose("norm", norm, layers.NORMS)
        make_mlp = layers.choose("mlp", mlp, layers.MLPS)
        self.norm1 = make_norm(width, **options)
        self.attention = Attention(width, num_heads, **options)
        self.norm2 = make_norm(width, **options)
        self.mlp = make_mlp(width, linear=layers.xavier_linear, **options)
        self.modulation = layers.linear(
            width, 6 * width, kernel_init=zeros, bias_init=zeros, **options
        )

    def mix(self, x: Array) -> Array:
        return self.attention(x)


class SiT(VelocityNetwork):
    """SiT with adaLN-zero blocks; with rms_norm and swiglu it is the paper's SiT+.

    Args:
        width: d, channels of a token; a multiple of 4 and of num_heads.
        depth: number of blocks.
        num_heads: heads of the attention.
        patch_size: p, side of a token's patch.
        in_channels: channels of the input, and of the velocity.
        num_classes: labels are 0 .. num_classes - 1; the label `num_classes` means "no class".
        learn_sigma: predict 2 * in_channels and use the first half, as the released weights do.
        norm: "layer_norm" (without an affine part, as published) or "rms_norm".
        mlp: "gelu" (as published) or "swiglu".
        dtype: compute dtype; parameters are float32.
        remat: recompute each block in the backward pass instead of keeping its activations.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        learn_sigma: bool,
        dtype,
        remat: bool,
        rngs: nnx.Rngs,
        norm: str = "layer_norm",
        mlp: str = "gelu",
    ):
        super().__init__(
            lambda: SiTBlock(width, num_heads, norm=norm, mlp=mlp, dtype=dtype, rngs=rngs),
            width=width,
            depth=depth,
            patch_size=patch_size,
            in_channels=in_channels,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            dtype=dtype,
            remat=remat,
            rngs=rngs,
            linear=layers.xavier_linear,
        )

    def embed(self, x: Array) -> Array:
        tokens = super().embed(x)
        return tokens + position_embedding(*tokens.shape[1:]).astype(tokens.dtype)

    def forward_macs(self, height: int, width: int) -> int:
        """As of the other models, and attention's two products of tokens by tokens."""
        tokens = (height // self.patch_size) * (width // self.patch_size)
        attention = len(self.blocks) * 2 * tokens**2 * self.width
        return super().forward_macs(height, width) + attention
