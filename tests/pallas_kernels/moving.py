"""Inputs that move, and the output's tangent along them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_conv.pallas import deformable_aggregate_pallas
from pallas_kernels.deformable_conv.points import Multiscale
from pallas_kernels.deformable_conv.reference import deformable_aggregate_reference
from pallas_kernels.deformable_conv.xla import deformable_aggregate_xla
from tests.pallas_kernels.aggregation import cast

# Compiled programs that run for a moment.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def operator(implementation, boundary):
    """A function of (values, points)."""
    if implementation == "xla":
        return functools.partial(deformable_aggregate_xla, boundary=boundary)
    if implementation == "pallas":
        return lambda values, points: deformable_aggregate_pallas(values, points, boundary, True)
    return lambda values, points: deformable_aggregate_reference(
        values, *points.to_offsets(), boundary=boundary
    )


@functools.cache
def along(implementation, boundary):
    """Compiled (inputs, their tangents) -> the output's tangent."""
    function = operator(implementation, boundary)
    return jax.jit(
        lambda primals, tangents: jax.jvp(function, primals, tangents)[1], compiler_options=QUICK
    )


def exactly(boundary, primals, tangents):
    """By automatic differentiation of the definition, in float64."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (primals, tangents))
        return np.asarray(along("reference", boundary)(*arrays))


def case(shape, form="multiscale", *, seed=1, dtype=jnp.float32, points_dtype=None):
    """((values, points), their tangents, a cotangent), drawn without a program for each shape."""
    b, h, w, g, c, k = shape
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    values, d_values, cotangent = (normal(b, h, w, g, c) for _ in range(3))
    points, d_points = (
        Multiscale(
            directions=0.3 * normal(b, h, w, g, k, 2),
            scales=0.3 * normal(b, h, w, g, k),
            weights=normal(b, h, w, g, k),
            scale_prior=normal(g),
            direction_prior=scale * np.clip(normal(k, 2), -1, 1),
            max_scale=scale * np.full(2, 6, np.float32),
        )
        for scale in (1, 0)  # the last two are constants
    )
    if form == "offsets":
        points, d_points = _offsets(points, d_points)
    values, points, cotangent = cast(values, points, cotangent, dtype, points_dtype)
    d_values, d_points, _ = cast(d_values, d_points, cotangent, dtype, points_dtype)
    return jax.tree.map(jnp.asarray, ((values, points), (d_values, d_points), cotangent))


@jax.jit
def _offsets(points, d_points):
    return jax.jvp(lambda x: x.to_offsets(), (points,), (d_points,))
