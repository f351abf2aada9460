"""The Pallas kernels compiled, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv import deformable_aggregate, multiscale_deformable_aggregate
from pallas_kernels.deformable_conv.points import Offsets
from tests.comparison import relative_error
from tests.pallas_kernels.inputs import NAMED_SHAPES, multiscale_inputs

pytestmark = pytest.mark.gpu

SHAPES = [(2, *shape[1:]) for shape in NAMED_SHAPES.values()] + [
    (2, 5, 7, 3, 12, 9),
    (1, 24, 17, 2, 8, 4),
    (3, 1, 1, 1, 1, 1),
    (1, 9, 40, 1, 136, 25),
]


@functools.cache
def both(implementation, boundary):
    """Compiled (values, points, cotangent) -> (output, *gradients)."""

    def aggregate(values, points):
        options = dict(boundary=boundary, implementation=implementation)
        if isinstance(points, Offsets):
            return deformable_aggregate(values, *points, **options)
        options |= dict(direction_prior=points.direction_prior, max_scale=points.max_scale)
        return multiscale_deformable_aggregate(values, *points[:4], **options)

    def run(values, points, cotangent):
        out, vjp = jax.vjp(aggregate, values, points)
        d_values, d_points = vjp(cotangent)
        return out, d_values, *d_points[:4]

    return jax.jit(run)


def cast(values, points, cotangent, dtype):
    per_query = [jnp.asarray(field, dtype) for field in points.per_query]
    points = type(points)(*per_query, *points.per_group, *points.constant)
    return jnp.asarray(values, dtype), points, jnp.asarray(cotangent, dtype)


@pytest.mark.parametrize("boundary", ["zeros", "truncate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_agree_with_plain_jax(shape, boundary):
    arrays = multiscale_inputs(shape)
    for points in (arrays[1], arrays[1].to_offsets()):
        full = (arrays[0], points, arrays[2])
        expected = both("xla", boundary)(*full)
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)):
            rounded = cast(*full, dtype)
            if dtype != jnp.float32:  # the same rounded inputs, in float32
                expected = both("xla", boundary)(*cast(*rounded, jnp.float32))
            actual = both("pallas", boundary)(*rounded)
            for a, b in zip(actual, expected, strict=True):
                assert relative_error(a, b) < tolerance * (10 if a.ndim == 1 else 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ten_runs_give_the_same_bits(dtype):
    for shape in SHAPES[:2]:
        arrays = cast(*multiscale_inputs(shape), dtype)
        first = jax.device_get(both("pallas", "zeros")(*arrays))
        for _ in range(9):
            again = jax.device_get(both("pallas", "zeros")(*arrays))
            jax.tree.map(np.testing.assert_array_equal, first, again)


def test_points_that_are_not_finite_add_nothing():
    values, points, cotangent = multiscale_inputs((2, 20, 24, 2, 24, 9))
    offsets, weights = (np.array(x) for x in points.to_offsets())
    bad = np.random.default_rng(0).random(weights.shape) < 0.3
    offsets[bad, 0] = np.random.default_rng(1).choice([np.nan, np.inf, -3e38], bad.sum())
    actual = both("pallas", "zeros")(values, Offsets(offsets, weights), cotangent)
    offsets[bad], weights[bad] = 0, 0
    expected = both("xla", "zeros")(values, Offsets(offsets, weights), cotangent)
    for a, b in zip(actual[:2], expected[:2], strict=True):
        assert relative_error(a, b) < 1e-5
    for a, b in zip(actual[2:], expected[2:], strict=True):
        assert not np.asarray(a)[bad].any()
        assert relative_error(np.asarray(a)[~bad], np.asarray(b)[~bad]) < 1e-5
