"""How thoroughly tests compile."""

import contextlib
import os

import jax


@contextlib.contextmanager
def quick():
    """Halves the time to compile, for programs that hardly run: here and in started commands."""
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
