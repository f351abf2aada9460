"""The public deformable aggregation: checks its arguments and picks an implementation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import backends
from pallas_kernels.deformable_conv.limits import MAX_ELEMENTS, MAX_SIDE
from pallas_kernels.deformable_conv.points import Multiscale, Offsets
from pallas_kernels.deformable_conv.xla import deformable_aggregate_xla
from pallas_kernels.devices import is_hopper, why_no_nvidia_kernels

BOUNDARIES = ("zeros", "truncate")
IMPLEMENTATIONS = ("pallas", "xla")
VALUE_DTYPES = ("float32", "bfloat16", "float16")


def deformable_aggregate(
    values: jax.Array,
    offsets: jax.Array,
    weights: jax.Array,
    *,
    boundary: str = "zeros",
    implementation: str | None = None,
    deterministic: bool = True,
) -> jax.Array:
    """out[b, q, g] = sum over k of weights[b, q, g, k] * sample(values[b, :, :, g], q + offset k).

    The operator of FlowDCN (arXiv 2410.22655) between its projections. `sample` is bilinear;
    `reference.py` says what it does at the border, and with numbers that are not finite: points
    with such a coordinate add nothing and have gradients of zero. Differentiable once, in either
    mode, and a gradient may be taken of what holds a jax.jvp, if it stops at the tangent; works
    under jit, vmap, scan and remat; a batch axis sharded over a mesh stays so.

    Args:
      values: [B, h, w, G, C], float32, bfloat16 or float16. h and w are at most 2^24, and h w is
        below 2^31.
      offsets: [B, h, w, G, K, 2], each sampling point from its query, (dx, dy) in tokens; float32
        or the dtype of `values`.
      weights: [B, h, w, G, K], of each sampling point; float32 or the dtype of `values`.
      boundary: "zeros" (the image is padded with zeros; for new training) or "truncate" (as in the
        kernels released with the paper; for released weights).
      implementation: "pallas", kernels for NVIDIA GPUs, whose arrays have less than 2^31 elements;
        "xla", plain JAX for any platform; None takes "pallas" where the default device can run it
        and the arrays are not too large (the parts that a device has, if they are sharded), and
        else "xla".
      deterministic: whether two runs must give the same bits. Both implementations always do.

    Returns:
      [B, h, w, G, C] in the dtype of `values`. Coordinates and sums are float32 inside, and each
      gradient has the dtype of its input. What a query's weights give to a token may be rounded to
      16 bits before it is multiplied: to bfloat16 if `values` are bfloat16, and to float16 if
      `values` and `weights` both are. It then has to be less than 65504, and loses bits below 6e-5;
      float32 `weights` of float16 `values` may be of any size.

    Raises:
      ValueError: a shape, `boundary` or `implementation` is not one of those above, or "pallas" is
        asked for where there is no NVIDIA GPU, or for larger arrays.
      TypeError: an argument is not an array, or its dtype is not one of those above.
      NotImplementedError: a gradient or a tangent of the result is differentiated.
    """
    del deterministic
    _check_values(values)
    _check_per_point("weights", weights, values, "K")
    _check_per_point("offsets", offsets, values, "K, 2", weights)
    points = Offsets(jnp.asarray(offsets), jnp.asarray(weights))
    aggregate, options = _implementation(boundary, implementation)
    return aggregate(jnp.asarray(values), points, *options)


def multiscale_deformable_aggregate(
    values: jax.Array,
    directions: jax.Array,
    scales: jax.Array,
    weights: jax.Array,
    scale_prior: jax.Array,
    *,
    direction_prior: jax.Array,
    max_scale: float | jax.Array,
    boundary: str = "zeros",
    implementation: str | None = None,
    deterministic: bool = True,
) -> jax.Array:
    """`deformable_aggregate` with FlowDCN's offsets, which need not exist in memory.

    offsets = (directions + direction_prior) * sigmoid(scales + scale_prior) * max_scale, in float32
    (paper section 3.2). Differentiable in all positional arguments.

    A point whose offset is not finite, whichever of these numbers is the cause, adds nothing to the
    output; the gradients of its direction, scale and weight are zero, and it adds nothing to that
    of the scale prior. Scales of plus or minus infinity mean fractions of 1 and 0. The gradient of
    the scale prior is the float32 sum of those of the scales, each possibly rounded to their dtype.

    Args:
      values: [B, h, w, G, C], float32, bfloat16 or float16.
      directions: [B, h, w, G, K, 2], (dx, dy); float32 or the dtype of `values`.
      scales: [B, h, w, G, K]; float32 or the dtype of `values`.
      weights: [B, h, w, G, K]; float32 or the dtype of `values`.
      scale_prior: [G] float32.
      direction_prior: [K, 2], a constant.
      max_scale: the largest radius in tokens, a number or [2] for x and y; a constant, which may be
        traced.
      boundary: as for `deformable_aggregate`, like the other options, results and errors.
      implementation: likewise.
      deterministic: likewise.
    """
    del deterministic
    _check_values(values)
    _check_per_point("weights", weights, values, "K")
    _check_per_point("scales", scales, values, "K", weights)
    _check_per_point("directions", directions, values, "K, 2", weights)
    groups, num_points = weights.shape[3:]
    direction_prior = jnp.asarray(direction_prior, jnp.float32)
    max_scale = jnp.asarray(max_scale, jnp.float32)
    scale_prior = jnp.asarray(scale_prior)
    if scale_prior.dtype != jnp.float32:
        raise TypeError(f"scale_prior has dtype {scale_prior.dtype}; expected float32")
    for name, array, shapes in (
        ("scale_prior", scale_prior, [(groups,)]),
        ("direction_prior", direction_prior, [(num_points, 2)]),
        ("max_scale", max_scale, [(), (2,)]),
    ):
        if array.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {array.shape}; expected {expected}")
    points = Multiscale(
        jnp.asarray(directions),
        jnp.asarray(scales),
        jnp.asarray(weights),
        scale_prior,
        jax.lax.stop_gradient(direction_prior),
        jax.lax.stop_gradient(jnp.broadcast_to(max_scale, (2,))),
    )
    aggregate, options = _implementation(boundary, implementation)
    return aggregate(jnp.asarray(values), points, *options)


def _implementation(boundary: str, implementation: str | None) -> tuple[Callable, tuple]:
    """What gives the result from (values, points, *options), and the options."""
    _check_choice("boundary", boundary, BOUNDARIES)
    left_to_us = implementation is None
    if left_to_us:
        implementation = "xla" if why_not_pallas() else "pallas"
    _check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "xla":
        return deformable_aggregate_xla, (boundary,)
    if reason := why_not_pallas():
        raise ValueError(f"implementation is 'pallas', which can't run here: {reason}")
    # Imported here: it needs private modules of JAX, on which plain JAX shall not depend.
    from pallas_kernels.deformable_conv.pallas import deformable_aggregate_pallas

    return deformable_aggregate_pallas, (boundary, False, left_to_us)


def why_not_pallas() -> str | None:
    """Why no Pallas kernels can run on JAX's default device; None if some can."""
    reason = why_no_nvidia_kernels()
    if reason is None and not (is_hopper() and backends.why_not(backends.MOSAIC_GPU) is None):
        reason = backends.why_not(backends.TRITON)
    return reason and f"{reason}; take 'xla'"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _check_array(name: str, array: jax.Array) -> None:
    if not (hasattr(array, "dtype") and hasattr(array, "shape")):
        raise TypeError(f"{name} is a {type(array).__name__}; expected an array")


def _check_values(values: jax.Array) -> None:
    _check_array("values", values)
    if len(values.shape) != 5 or 0 in values.shape:
        raise ValueError(
            f"values has shape {values.shape}; expected [B, h, w, G, C] with no axis empty"
        )
    h, w = values.shape[1:3]
    if max(h, w) > MAX_SIDE or h * w > MAX_ELEMENTS:
        raise ValueError(
            f"values has shape {values.shape}; expected h and w of at most {MAX_SIDE}, and at most"
            f" {MAX_ELEMENTS} tokens h w"
        )
    if values.dtype.name not in VALUE_DTYPES:
        raise TypeError(
            f"values has dtype {values.dtype}; expected one of {', '.join(VALUE_DTYPES)}"
        )


def _check_per_point(name: str, array, values, axes: str, weights=None) -> None:
    """Checks the array of shape [B, h, w, G, axes]; `weights`, already checked, gives K."""
    _check_array(name, array)
    tokens = tuple(values.shape[:4])
    tail = (
        (array.shape[4] if len(array.shape) > 4 else 0,) if weights is None else weights.shape[4:]
    )
    expected = (*tokens, *tail, *((2,) if axes.endswith("2") else ()))
    if tuple(array.shape) != expected or tail[0] == 0:
        shown = (*tokens, "K") if weights is None else expected
        beside = f"values of shape {values.shape}"
        if weights is not None:
            beside = f"weights of shape {weights.shape}"
        raise ValueError(
            f"{name} has shape {array.shape}; expected [B, h, w, G, {axes}] = {shown} with K >= 1,"
            f" to go with {beside}"
        )
    if array.dtype.name not in ("float32", values.dtype.name):
        raise TypeError(
            f"{name} has dtype {array.dtype}; expected float32 or that of values, {values.dtype}"
        )
