"""Inputs that move, and the output's tangent along them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_conv.named_shapes import model_inputs
from pallas_kernels.deformable_conv.pallas import deformable_aggregate_pallas
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
    """((values, points), their tangents, a cotangent)."""
    values, points, cotangent = model_inputs(shape, seed=seed)
    d_values, d_points, _ = model_inputs(shape, seed=seed + 1)
    still = {name: jnp.zeros_like(getattr(points, name)) for name in points._fields[4:]}
    d_points = d_points._replace(**still)
    if form == "offsets":
        points, d_points = jax.jvp(lambda x: x.to_offsets(), (points,), (d_points,))
    values, points, cotangent = cast(values, points, cotangent, dtype, points_dtype)
    d_values, d_points, _ = cast(d_values, d_points, cotangent, dtype, points_dtype)
    return (values, points), (d_values, d_points), cotangent
