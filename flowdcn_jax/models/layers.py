"""Layers shared by the models: PyTorch-initialised linears, norms, MLPs, embedders, patches.

Parameters are float32; `dtype` is the compute dtype. In float32 every matrix product asks for full
precision, because GPUs otherwise round its operands to TF32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.models.products import add_bias, product

NORM_EPSILON = 1e-6
TIMESTEP_FREQUENCIES = 128  # pairs of (cos, sin): 256 features
TIMESTEP_MAX_PERIOD = 10_000.0


def uniform_fan_in(fan_in: int):
    """PyTorch's default for a Linear's weight and bias: uniform in +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nnx.Module):
    """x W + b with PyTorch's default initial values unless others are given.

    Operands are of the compute dtype `dtype`, and so is the result unless `out_dtype` is float32.
    Sums are float32, and so are the parameters' gradients unless `gradient_dtype` says otherwise
    (see `products`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype,
        rngs: nnx.Rngs,
        out_dtype=None,
        gradient_dtype=jnp.float32,
        precision=None,
        use_bias: bool = True,
        kernel_init=None,
        bias_init=None,
    ):
        default_init = uniform_fan_in(in_features)
        shape = (in_features, out_features)
        self.dtype, self.out_dtype = dtype, out_dtype
        self.gradient_dtype, self.precision = gradient_dtype, precision
        self.kernel = nnx.Param((kernel_init or default_init)(rngs.params(), shape))
        bias = (bias_init or default_init)(rngs.params(), shape[1:]) if use_bias else None
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Array) -> Array:
        """[..., in_features] -> [..., out_features], in out_dtype, by default the compute dtype."""
        gradient_dtype = self.gradient_dtype
        y = product(
            x.astype(self.dtype),
            self.kernel[...],
            dtype=self.out_dtype,
            gradient_dtype=gradient_dtype,
            precision=self.precision,
        )
        if self.bias is None:
            return y
        return add_bias(y, self.bias[...], gradient_dtype=gradient_dtype)


def xavier_linear(in_features: int, out_features: int, **options) -> Linear:
    """A Linear with Xavier-uniform weights and a bias of zero unless others are given."""
    defaults = dict(
        kernel_init=nnx.initializers.xavier_uniform(), bias_init=nnx.initializers.zeros_init()
    )
    return Linear(in_features, out_features, **defaults | options)


def rms_norm(features: int, *, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm with a learnable weight and float32 statistics."""
    return nnx.RMSNorm(
        features, epsilon=NORM_EPSILON, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
    )


def layer_norm(features: int, *, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm without an affine part; float32 statistics in two passes."""
    return nnx.LayerNorm(
        features,
        epsilon=NORM_EPSILON,
        use_bias=False,
        use_scale=False,
        use_fast_variance=False,
        dtype=dtype,
        rngs=rngs,
    )


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """adaLN: x [B,h,w,d] scaled by 1 + scale [B,d] and moved by shift [B,d]."""
    return x * (1 + scale[:, None, None, :]) + shift[:, None, None, :]


def patchify(x: Array, patch_size: int) -> Array:
    """[B,H,W,C] -> [B,H/p,W/p,p*p*C]; within a patch rows come first, channels last."""
    batch, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(batch, height // p, p, width // p, p, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // p, width // p, p * p * channels)


def unpatchify(x: Array, patch_size: int) -> Array:
    """The inverse of `patchify`: [B,h,w,p*p*C] -> [B,h*p,w*p,C], for any h and w."""
    batch, h, w, features = x.shape
    p = patch_size
    channels = features // (p * p)
    x = x.reshape(batch, h, w, p, p, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, h * p, w * p, channels)


def hidden_padding(hidden: int, dtype) -> int:
    """Zero columns that a hidden width computed in `dtype` is widened by; mostly none.

    NVIDIA's 16-bit products want widths that are multiples of 8, and to get them XLA copies the
    activations to wider arrays and back. Wider weights spare it that. 64: a step of their kernels.
    """
    aligned = hidden % 8 == 0 or jnp.dtype(dtype).itemsize != 2
    return 0 if aligned else -hidden % 64


class SwiGLU(nnx.Module):
    """w2(SiLU(w1 x) * w3 x), no bias; hidden width int(8/3 width).

    Of the paper's models L/2's alone, 2730, gets a `hidden_padding`: columns that are SiLU(0) * 0
    and meet rows of zeros, so that the function stays the same. The parameters have none.
    """

    def __init__(self, width: int, *, linear=Linear, **linear_options):
        hidden = self.hidden_width(width)
        options = dict(use_bias=False, **linear_options)
        self.w1 = linear(width, hidden, **options)
        self.w2 = linear(hidden, width, **options)
        self.w3 = linear(width, hidden, **options)

    @staticmethod
    def hidden_width(width: int) -> int:
        return 2 * 4 * width // 3

    def __call__(self, x: Array) -> Array:
        more = (0, hidden_padding(self.w1.kernel.shape[1], self.w1.dtype))
        hidden = nnx.silu(self._product(x, self.w1, ((0, 0), more)))
        hidden *= self._product(x, self.w3, ((0, 0), more))
        return self._product(hidden, self.w2, (more, (0, 0)))

    def _product(self, x: Array, layer: Linear, padding) -> Array:
        kernel = jnp.pad(layer.kernel[...], padding)
        return product(x.astype(layer.dtype), kernel, gradient_dtype=layer.gradient_dtype)


class GeluMLP(nnx.Module):
    """out(GELU(hidden x)), with biases; hidden width 4 width; the tanh form of GELU."""

    def __init__(self, width: int, *, linear=Linear, **linear_options):
        self.hidden = linear(width, 4 * width, **linear_options)
        self.out = linear(4 * width, width, **linear_options)

    def __call__(self, x: Array) -> Array:
        return self.out(nnx.gelu(self.hidden(x), approximate=True))


NORMS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
MLPS = {"swiglu": SwiGLU, "gelu": GeluMLP}


class TimestepEmbedder(nnx.Module):
    """Sinusoids of t in [0,1] (unscaled, cos before sin), then Linear-SiLU-Linear, in float32.

    In bfloat16 it would err by six times what two neighbours of a 250-step grid differ by.
    """

    def __init__(self, width: int, *, linear=Linear, **linear_options):
        shared = dict(kernel_init=nnx.initializers.normal(0.02), **linear_options)
        self.hidden = linear(2 * TIMESTEP_FREQUENCIES, width, **shared)
        self.out = linear(width, width, **shared)

    def __call__(self, t: Array) -> Array:
        """t [B] -> [B,width] float32."""
        exponents = jnp.arange(TIMESTEP_FREQUENCIES, dtype=jnp.float32) / TIMESTEP_FREQUENCIES
        frequencies = jnp.exp(-math.log(TIMESTEP_MAX_PERIOD) * exponents)
        angles = t.astype(jnp.float32)[:, None] * frequencies
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.out(nnx.silu(self.hidden(features)))


class ClassEmbedder(nnx.Module):
    """A row a class, and a last one for "no class".

    Rows are picked by a product with one-hot vectors, whose gradient is a matrix product too: that
    of a lookup is a scatter, which GPUs add up in another order at each run.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        precision=None,
        gradient_dtype=jnp.float32,
    ):
        init = nnx.initializers.normal(0.02)
        self.precision, self.gradient_dtype = precision, gradient_dtype
        self.embedding = nnx.Param(init(rngs.params(), (num_classes + 1, width), jnp.float32))

    def __call__(self, y: Array) -> Array:
        """y [B] integers -> [B,width] float32."""
        one_hot = jax.nn.one_hot(y, self.embedding.shape[0], dtype=jnp.float32)
        table = self.embedding[...]
        return product(one_hot, table, gradient_dtype=self.gradient_dtype, precision=self.precision)
