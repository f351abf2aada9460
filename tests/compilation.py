"""How thoroughly tests compile."""

import contextlib

import jax


@contextlib.contextmanager
def quick():
    """Halves the time to compile, for programs that hardly run."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
