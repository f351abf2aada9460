"""SiLU(gate) * up of the two halves of one product, whose gradient is one array as well."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.fused.operator import make_operator


def swiglu(both: Array, *, interpret: bool = False) -> Array:
    """[..., 2F] -> [..., F]: SiLU of the first half times the second, in the dtype of `both`."""
    width = both.shape[-1]
    (out,) = _operator(interpret)(both.reshape(both.shape[0], -1, width))
    return out.reshape(*both.shape[:-1], width // 2)


@functools.cache
def _operator(interpret: bool):
    from pallas_kernels.fused import gating_kernels  # needs Pallas' Triton

    return make_operator(
        "swiglu",
        swiglu_reference,
        functools.partial(gating_kernels.forward, interpret=interpret),
        functools.partial(gating_kernels.backward, interpret=interpret),
        inputs=("b t e",),
        outputs=("b t f",),
    )


def swiglu_reference(both: Array) -> tuple[Array]:
    """The same in plain JAX."""
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    return ((jax.nn.silu(gate) * up).astype(both.dtype),)
