"""The public deformable aggregation: checks its arguments and picks an implementation."""

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv.xla import deformable_aggregate_xla

BOUNDARIES = ("zeros", "truncate")

# Each takes (values, offsets, weights, boundary), checked.
IMPLEMENTATIONS = {"xla": deformable_aggregate_xla}

VALUE_DTYPES = ("float32", "bfloat16", "float16")


def deformable_aggregate(
    values: jax.Array,
    offsets: jax.Array,
    weights: jax.Array,
    *,
    boundary: str = "zeros",
    implementation: str | None = None,
) -> jax.Array:
    """out[b, q, g] = sum over k of weights[b, q, g, k] * sample(values[b, :, :, g], q + offset k).

    The operator of FlowDCN (arXiv 2410.22655) between its projections. `sample` is bilinear;
    `reference.py` says what it does at the border, and with coordinates that are not finite (they
    add nothing). Differentiable in reverse mode; works under jit, vmap and remat; a batch axis
    sharded over a mesh stays so.

    Args:
      values: [B, h, w, G, C], float32, bfloat16 or float16.
      offsets: [B, h, w, G, K, 2], each sampling point from its query, (dx, dy) in tokens; float32
        or the dtype of `values`.
      weights: [B, h, w, G, K], of each sampling point; float32 or the dtype of `values`.
      boundary: "zeros" (the image is padded with zeros; for new training) or "truncate" (as in the
        kernels released with the paper; for released weights).
      implementation: "xla", plain JAX for any platform; None picks one, at present always "xla".

    Returns:
      [B, h, w, G, C] in the dtype of `values`. Coordinates and sums are float32 inside, and each
      gradient has the dtype of its input.

    Raises:
      ValueError: a shape, `boundary` or `implementation` is not one of those above.
      TypeError: an argument is not an array, or its dtype is not one of those above.
    """
    _check_choice("boundary", boundary, BOUNDARIES)
    if implementation is None:
        implementation = "xla"
    _check_choice("implementation", implementation, tuple(IMPLEMENTATIONS))
    _check_arrays(values, offsets, weights)
    arrays = (jnp.asarray(array) for array in (values, offsets, weights))
    return IMPLEMENTATIONS[implementation](*arrays, boundary)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _check_arrays(values: jax.Array, offsets: jax.Array, weights: jax.Array) -> None:
    for name, array in (("values", values), ("offsets", offsets), ("weights", weights)):
        if not (hasattr(array, "dtype") and hasattr(array, "shape")):
            raise TypeError(f"{name} is a {type(array).__name__}; expected an array")

    if len(values.shape) != 5 or 0 in values.shape:
        raise ValueError(
            f"values has shape {values.shape}; expected [B, h, w, G, C] with no axis empty"
        )
    tokens = tuple(values.shape[:4])
    if len(weights.shape) != 5 or tuple(weights.shape[:4]) != tokens or weights.shape[4] == 0:
        raise ValueError(
            f"weights has shape {weights.shape}; expected [B, h, w, G, K] = {(*tokens, 'K')} with"
            f" K >= 1, to go with values of shape {values.shape}"
        )
    expected = (*weights.shape, 2)
    if tuple(offsets.shape) != expected:
        raise ValueError(
            f"offsets has shape {offsets.shape}; expected [B, h, w, G, K, 2] = {expected},"
            f" to go with weights of shape {weights.shape}"
        )

    dtype = values.dtype.name
    if dtype not in VALUE_DTYPES:
        raise TypeError(f"values has dtype {dtype}; expected one of {', '.join(VALUE_DTYPES)}")
    for name, array in (("offsets", offsets), ("weights", weights)):
        if array.dtype.name not in ("float32", dtype):
            raise TypeError(
                f"{name} has dtype {array.dtype}; expected float32 or that of values, {dtype}"
            )
