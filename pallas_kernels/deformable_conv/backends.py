"""Which of Pallas' backends this JAX has, of those that kernels are written for.

Each is imported where its kernels are chosen, and nowhere before: without it the others work. Names
of JAX that are private stand in `triton.py` alone.
"""

import functools
import importlib

import jax

TRITON = "triton"
MOSAIC_GPU = "launch"
NAMES = {TRITON: "Triton", MOSAIC_GPU: "Mosaic GPU"}


@functools.cache
def why_not(backend: str) -> str | None:
    """Why this JAX can't compile the kernels of a backend, TRITON or MOSAIC_GPU; None if it can."""
    try:
        importlib.import_module(f"pallas_kernels.deformable_conv.{backend}")
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} lacks Pallas' {NAMES[backend]} backend, or parts: {error}"
    return None
