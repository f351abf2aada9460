"""How large arrays and numbers may be."""

import math
from collections.abc import Iterable

import jax.numpy as jnp

MAX_ELEMENTS = 2**31 - 1  # of an array in a kernel, and tokens of an image: indices are int32
MAX_SIDE = 2**24  # tokens along an axis: coordinates are float32


def why_not_indexable(shapes: Iterable[tuple[int, ...]]) -> str | None:
    """Why int32 indices don't reach all elements of arrays of these shapes; None if they do."""
    for shape in shapes:
        if (size := math.prod(shape)) > MAX_ELEMENTS:
            return f"an array of shape {shape} has {size} elements; expected at most {MAX_ELEMENTS}"
    return None


def check_indexable(name: str, arrays: Iterable) -> None:
    """Raises ValueError if one of the arrays of kernel `name` has more elements than indices."""
    if reason := why_not_indexable(array.shape for array in arrays):
        raise ValueError(f"{name}: {reason}. Split the batch, or take implementation='xla'")


def product_dtype(dtype, weights_dtype) -> jnp.dtype:
    """The dtype in which weights of tokens are multiplied by values or gradients of `dtype`.

    Float16 has no place for the weights that float32 has.
    """
    narrow = jnp.dtype(dtype) == jnp.float16 and jnp.dtype(weights_dtype) != jnp.float16
    return jnp.dtype(jnp.float32 if narrow else dtype)
