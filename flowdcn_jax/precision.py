"""Which dtype to compute in, and how exactly to multiply in it."""

import jax
import jax.numpy as jnp

DTYPES = ("auto", "float32", "bfloat16")  # what a config may name


def compute_dtype(name: str):
    """The compute dtype that a config's "auto", "float32" or "bfloat16" stands for.

    "auto" is bfloat16 on accelerators and float32 on CPUs, which have no fast bfloat16.
    """
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


# float32 operands as three bfloat16 products, exact to 16 bits of their mantissas: on GPUs it takes
# a fraction of the time of float32 products, and what is around it is bfloat16.
BESIDE_BFLOAT16 = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """HIGHEST for float32 (no TF32), the backend's default for narrower types."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
