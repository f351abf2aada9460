"""The kernels that keep an image in shared memory: simulated, lowered for CUDA, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv import shared_image
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES
from pallas_kernels.deformable_conv.points import Offsets, flatten_points, flatten_tokens
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import inputs, lowered_for_cuda, named_structs, reference

SHAPES = [
    ((2, 8, 8, 2, 16, 9), "multiscale", "zeros", 4),  # a last point alone
    ((1, 5, 7, 3, 72, 4), "multiscale", "truncate", 4),  # chunks left over; queries left over
    ((1, 3, 9, 2, 64, 9), "offsets", "truncate", 8),  # rows with padding between them
    ((2, 1, 1, 1, 8, 1), "offsets", "zeros", 4),
    ((1, 6, 16, 1, 24, 25), "multiscale", "zeros", 16),
]


def forward(values, points, boundary, num_warps, interpret=True):
    h, w = values.shape[1:3]
    points = flatten_points(points)
    out = shared_image.forward(
        flatten_tokens(values),
        points,
        h=h,
        w=w,
        boundary=boundary,
        num_warps=num_warps,
        interpret=interpret,
    )
    return out.reshape(values.shape)


def point_gradients(values, points, d_out, boundary, num_warps, interpret=True):
    h, w = values.shape[1:3]
    like = points.per_query
    points = flatten_points(points)
    gradients = shared_image.point_gradients(
        flatten_tokens(values),
        points,
        flatten_tokens(d_out),
        h=h,
        w=w,
        dtypes=tuple(x.dtype for x in like),
        boundary=boundary,
        num_warps=num_warps,
        interpret=interpret,
    )
    return [x.reshape(y.shape) for x, y in zip(gradients, like, strict=True)]


@pytest.mark.parametrize("shape, form, boundary, num_warps", SHAPES)
def test_matches_the_definition(shape, form, boundary, num_warps):
    """Forward, weights are rounded to 16 bits. In the gradients of float32 points nothing is."""
    values, points, d_out = inputs(shape, form, jnp.bfloat16, jnp.float32)
    out, _, expected = reference(boundary, values, points, d_out)
    assert relative_error(forward(values, points, boundary, num_warps), out) < 1e-2
    actual = point_gradients(values, points, d_out, boundary, num_warps)
    for a, b in zip(actual, expected, strict=False):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("boundary", ["zeros", "truncate"])
def test_forward_takes_the_right_rows(boundary):
    """Weights of corners are short numbers here, so that only the output is rounded."""
    values, points, _ = inputs((2, 7, 6, 2, 40, 9), "offsets", jnp.float16, jnp.float32)
    offsets = jnp.round(points.offsets * 8) / 8
    weights = jnp.exp2(jnp.round(points.weights))
    points = Offsets(offsets, weights)
    out, _, _ = reference(boundary, values, points, values)
    assert relative_error(forward(values, points, boundary, 4), out) < 2**-10


def test_channels_in_parts():
    values, points, _ = inputs((1, 40, 40, 2, 128, 2), "multiscale", jnp.bfloat16, jnp.bfloat16)
    assert shared_image.parts(40, 40, 128) == 2
    out, _, _ = reference("zeros", values, points, values)
    assert relative_error(forward(values, points, "zeros", 16), out) < 1e-2


def test_points_that_are_not_finite_add_nothing():
    values, points, d_out = inputs((1, 4, 8, 1, 8, 3), "offsets", jnp.bfloat16, jnp.float32)
    offsets = np.array(points.offsets)
    bad = offsets.copy()
    bad[0, 0, 0, 0, 1] = np.nan, 0
    bad[0, 1, 2, 0, 0] = np.inf, 1
    bad[0, 3, 7, 0, 2] = -3e38, 3e38
    weights = np.array(points.weights)
    weights[np.any(bad != offsets, axis=-1)] = 0
    expected = forward(values, Offsets(jnp.asarray(offsets), jnp.asarray(weights)), "zeros", 4)
    points = Offsets(jnp.asarray(bad), points.weights)
    np.testing.assert_array_equal(forward(values, points, "zeros", 4), expected)
    for gradient in point_gradients(values, points, d_out, "zeros", 4):
        assert np.isfinite(gradient).all()


def test_scales_that_are_not_numbers_add_nothing():
    values, points, _ = inputs((1, 4, 8, 1, 8, 3), "multiscale", jnp.bfloat16, jnp.float32)
    without = points._replace(weights=points.weights.at[0, 1, 2, 0, 1].set(0))
    points = points._replace(scales=points.scales.at[0, 1, 2, 0, 1].set(jnp.nan))
    actual, expected = (forward(values, p, "zeros", 4) for p in (points, without))
    np.testing.assert_array_equal(actual, expected)


def test_what_it_cannot_take():
    assert shared_image.why_not(16, 16, 72, jnp.bfloat16, in_parts=False) is None
    assert "float32" in shared_image.why_not(16, 16, 72, jnp.float32, in_parts=False)
    assert "12 channels" in shared_image.why_not(16, 16, 12, jnp.bfloat16, in_parts=False)
    assert shared_image.why_not(64, 64, 72, jnp.bfloat16, in_parts=True) is None
    assert "64 x 64" in shared_image.why_not(64, 64, 72, jnp.bfloat16, in_parts=False)
    assert "200 x 200" in shared_image.why_not(200, 200, 72, jnp.bfloat16, in_parts=True)


@pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, "bfloat16") for shape in NAMED_SHAPES), ("XL at 256", "float16")],
)
def test_every_named_shape_lowers_for_cuda(shape, dtype):
    values, points = named_structs(shape, dtype)
    h, w, _, c = values.shape[1:]
    run = functools.partial(forward, boundary="zeros", num_warps=16, interpret=False)
    assert lowered_for_cuda(run, values, points).count("custom_call @mosaic_gpu") == 1
    if shared_image.why_not(h, w, c, dtype, in_parts=False) is None:
        run = functools.partial(point_gradients, boundary="zeros", num_warps=4, interpret=False)
        assert lowered_for_cuda(run, values, points, values).count("custom_call @mosaic_gpu") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, form, boundary, num_warps",
    [
        *SHAPES,
        ((2, 16, 16, 16, 72, 9), "multiscale", "zeros", 4),
        ((1, 32, 32, 4, 72, 9), "multiscale", "truncate", 16),
        ((1, 64, 64, 2, 72, 9), "multiscale", "zeros", 16),
    ],
)
def test_a_gpu_does_what_the_simulation_does(shape, form, boundary, num_warps):
    if not jax.devices()[0].compute_capability.startswith("9."):
        pytest.skip("needs a GPU of compute capability 9.0")
    values, points, d_out = inputs(shape, form, jnp.bfloat16, jnp.float32)
    simulated = forward(values, points, boundary, num_warps)
    actual = forward(values, points, boundary, num_warps, interpret=False)
    assert relative_error(actual, simulated) < 2e-3
    if shared_image.why_not(*shape[1:3], shape[4], values.dtype, in_parts=False):
        return
    args = (values, points, d_out, boundary, num_warps)
    for a, b in zip(point_gradients(*args, interpret=False), point_gradients(*args), strict=True):
        assert relative_error(a, b) < 1e-5
