"""A gated residual, the norm after it and its modulation: what stands between two branches."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.fused.norm import Norm
from pallas_kernels.fused.operator import make_operator


def residual_adaln(
    x: Array,
    mixed: Array,
    bias: Array | None,
    gate: Array,
    factor: Array,
    shift: Array,
    *,
    norm: Norm,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """y = x + gate (mixed + bias), and h = norm(y) factor + shift, by kernels.

    y is rounded to the dtype of x before the norm sees it.

    Args:
        x: [B,h,w,D].
        mixed: [B,h,w,D], of the dtype of x.
        bias: [D] float32, or None.
        gate: [B,D] float32.
        factor: [B,D] float32; a norm's weight is part of it.
        shift: [B,D] float32.
        norm: which.
        interpret: run the kernels on any platform, slowly, for tests.

    Returns:
        (y, h), [B,h,w,D] each, of the dtype of x.
    """
    operator = _operator(norm, bias is not None, interpret)
    per_image = (gate, factor, shift) if bias is None else (gate, factor, shift, bias)
    tokens = x.shape[0], -1, x.shape[-1]
    y, h = operator(x.reshape(tokens), mixed.reshape(tokens), *per_image)
    return y.reshape(x.shape), h.reshape(x.shape)


def residual_adaln_reference(x, mixed, gate, factor, shift, bias=None, *, norm: Norm):
    """The same in plain JAX, of tokens [B,T,D]."""
    mixed = mixed.astype(jnp.float32)
    mixed = mixed if bias is None else mixed + bias
    y = (x.astype(jnp.float32) + gate[:, None] * mixed).astype(x.dtype)
    row = y.astype(jnp.float32)
    if norm.centred:
        row -= jnp.mean(row, axis=-1, keepdims=True)
    row *= jax.lax.rsqrt(jnp.mean(row**2, axis=-1, keepdims=True) + norm.epsilon)
    return y, (row * factor[:, None] + shift[:, None]).astype(x.dtype)


@functools.cache
def _operator(norm: Norm, has_bias: bool, interpret: bool):
    from pallas_kernels.fused import adaln_kernels  # needs Pallas' Triton

    return make_operator(
        "residual_adaln",
        functools.partial(residual_adaln_reference, norm=norm),
        functools.partial(adaln_kernels.forward, norm=norm, interpret=interpret),
        functools.partial(
            adaln_kernels.backward, norm=norm, has_bias=has_bias, interpret=interpret
        ),
        inputs=("b t d", "b t d", "b d", "b d", "b d") + (("d",) if has_bias else ()),
        outputs=("b t d", "b t d"),
    )
