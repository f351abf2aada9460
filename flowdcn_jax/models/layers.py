"""Layers shared by the models: PyTorch-initialised linears, norms, MLPs, embedders, patches.

Parameters are float32; `dtype` is the compute dtype. In float32 every matrix product asks for full
precision, because GPUs otherwise round its operands to TF32.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.models.products import add_bias, product
from pallas_kernels import fused
from pallas_kernels.fused import Norm, takes_kernels

NORM_EPSILON = 1e-6
TIMESTEP_FREQUENCIES = 128  # pairs of (cos, sin): 256 features
TIMESTEP_MAX_PERIOD = 10_000.0


def uniform_fan_in(fan_in: int):
    """PyTorch's default for a Linear's weight and bias: uniform in +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Branch(NamedTuple):
    """What a mixer or an MLP gives: `tokens` + `bias`, which a kernel may add in passing."""

    tokens: Array  # [B,h,w,d], in the compute dtype
    bias: Array | None  # [d] float32


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
        y, bias = self.apart(x)
        return y if bias is None else add_bias(y, bias, gradient_dtype=self.gradient_dtype)

    def apart(self, x: Array) -> Branch:
        """x W and, apart from it, b, where a kernel adds it in passing; else their sum."""
        y = product(
            x.astype(self.dtype),
            self.kernel[...],
            dtype=self.out_dtype,
            gradient_dtype=self.gradient_dtype,
            precision=self.precision,
        )
        bias = None if self.bias is None else self.bias[...]
        if bias is None or takes_kernels(y.dtype):
            return Branch(y, bias)
        return Branch(add_bias(y, bias, gradient_dtype=self.gradient_dtype), None)


def joint_product(x: Array, kernels: Sequence[Array], like: Linear) -> Array:
    """x [..., n] by several kernels [n, m] at once, side by side, with the options of `like`.

    One product reads x once, and in the backward pass sums over all columns at once.
    """
    kernel = jnp.concatenate(kernels, axis=1)
    options = dict(gradient_dtype=like.gradient_dtype, precision=like.precision)
    return product(x.astype(like.dtype), kernel, dtype=like.out_dtype, **options)


def joint_linear(x: Array, linears: Sequence[Linear]) -> list[Array]:
    """What each of `linears`, which share their options, makes of x [..., n].

    By one product on GPUs, where that is faster.
    """
    like = linears[0]
    if not takes_kernels(like.dtype):
        return [linear(x) for linear in linears]
    y = joint_product(x, [linear.kernel[...] for linear in linears], like)
    ends = itertools.accumulate(linear.kernel.shape[1] for linear in linears)
    parts = jnp.split(y, list(ends)[:-1], axis=-1)
    add = functools.partial(add_bias, gradient_dtype=like.gradient_dtype)
    return [
        part if linear.bias is None else add(part, linear.bias[...])
        for part, linear in zip(parts, linears, strict=True)
    ]


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


def residual_adaln(
    x: Array, branch: Branch, gate: Array, norm: nnx.Module, scale: Array, shift: Array
) -> tuple[Array, Array]:
    """y = x + gate * branch, and norm(y) modulated: by one kernel where there is one.

    x [B,h,w,d]; gate, scale and shift [B,d] float32.
    """
    if takes_kernels(x.dtype):
        centred = isinstance(norm, nnx.LayerNorm)
        factor = 1 + scale if centred else (1 + scale) * norm.scale[...]
        norm = Norm(centred, NORM_EPSILON)
        return fused.residual_adaln(x, *branch, gate, factor, shift, norm=norm)
    y = add_residual(x, branch, gate)
    return y, modulate(norm(y), shift.astype(x.dtype), scale.astype(x.dtype))


def add_residual(x: Array, branch: Branch, gate: Array) -> Array:
    """x + gate [B,d] * branch, in the dtype of x [B,h,w,d]."""
    mixed, bias = branch
    if bias is not None:
        mixed = add_bias(mixed, bias)
    return x + gate.astype(x.dtype)[:, None, None, :] * mixed


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

    def __call__(self, x: Array) -> Branch:
        more = (0, hidden_padding(self.w1.kernel.shape[1], self.w1.dtype))
        w1, w3 = (jnp.pad(layer.kernel[...], ((0, 0), more)) for layer in (self.w1, self.w3))
        w2 = jnp.pad(self.w2.kernel[...], (more, (0, 0)))
        if takes_kernels(self.w1.dtype):
            hidden = fused.swiglu(joint_product(x, (w1, w3), self.w1))
        else:
            hidden = nnx.silu(joint_product(x, (w1,), self.w1))
            hidden *= joint_product(x, (w3,), self.w3)
        return Branch(joint_product(hidden, (w2,), self.w2), None)


class GeluMLP(nnx.Module):
    """out(GELU(hidden x)), with biases; hidden width 4 width; the tanh form of GELU."""

    def __init__(self, width: int, *, linear=Linear, **linear_options):
        self.hidden = linear(width, 4 * width, **linear_options)
        self.out = linear(4 * width, width, **linear_options)

    def __call__(self, x: Array) -> Branch:
        return self.out.apart(nnx.gelu(self.hidden(x), approximate=True))


NORMS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
MLPS = {"swiglu": SwiGLU, "gelu": GeluMLP}


class TimestepEmbedder(nnx.Module):
    """Sinusoids of t in [0,1] (unscaled, cos before sin), then Linear-SiLU-Linear, in float32.

    In bfloat16 it would err by six times what two neighbours of a 250-step grid differ by. One that
    `starts_at_zero` adds nothing until it is trained: its last Linear is zero at first.
    """

    def __init__(
        self, width: int, *, linear=Linear, starts_at_zero: bool = False, **linear_options
    ):
        shared = dict(kernel_init=nnx.initializers.normal(0.02), **linear_options)
        zeros = nnx.initializers.zeros_init()
        last = dict(kernel_init=zeros, bias_init=zeros) if starts_at_zero else {}
        self.hidden = linear(2 * TIMESTEP_FREQUENCIES, width, **shared)
        self.out = linear(width, width, **shared | last)

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
