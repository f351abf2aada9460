"""The kernels that gather rows from shared memory: simulated, lowered for CUDA, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv import row_gather
from pallas_kernels.deformable_conv.blocks import Blocks, RowGather, SparseMatrix
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES
from pallas_kernels.deformable_conv.points import flatten_points, flatten_tokens
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import (
    check_released_in_float16,
    inputs,
    lowered_for_cuda,
    mostly_slow,
    named_structs,
    points_that_are_not_finite,
    reference,
)

SHAPES = [
    ((1, 5, 7, 3, 72, 4), "multiscale", "truncate", jnp.bfloat16),  # queries left over
    ((2, 2, 2, 1, 8, 1), "offsets", "zeros", jnp.float16),  # all channels are the corners' rest
    ((2, 20, 20, 2, 24, 9), "multiscale", "zeros", jnp.float16),
    ((1, 16, 16, 2, 80, 9), "multiscale", "truncate", jnp.float32),
    ((1, 64, 64, 1, 72, 3), "multiscale", "zeros", jnp.bfloat16),  # a band for each block
    ((1, 10, 130, 2, 96, 3), "multiscale", "zeros", jnp.float32),  # bands fit by halves, or not
    ((1, 20, 100, 1, 56, 2), "multiscale", "zeros", jnp.float32),  # the other half would fit whole
]


def run(function, values, points, *others, boundary, interpret=True, **options):
    h, w = values.shape[1:3]
    flat = flatten_tokens(values), flatten_points(points), *map(flatten_tokens, others)
    return function(*flat, h=h, w=w, boundary=boundary, num_warps=4, interpret=interpret, **options)


def forward(values, points, **options):
    return run(row_gather.forward, values, points, **options).reshape(values.shape)


def point_gradients(values, points, d_out, **options):
    like = points.per_query
    dtypes = tuple(x.dtype for x in like)
    function = row_gather.point_gradients
    gradients, _ = run(function, values, points, d_out, dtypes=dtypes, **options)
    return [x.reshape(y.shape) for x, y in zip(gradients, like, strict=True)]


def check(values, points, d_out, boundary):
    """Only the output is rounded to the values' dtype; the points' gradients are float32."""
    out, _, d_points = reference(boundary, values, points, d_out)
    tolerance = {2: 3e-3, 4: 1e-5}[values.dtype.itemsize]
    assert relative_error(forward(values, points, boundary=boundary), out) < tolerance
    actual = point_gradients(values, points, d_out, boundary=boundary)
    for a, b in zip(actual, d_points, strict=False):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("shape, form, boundary, dtype", mostly_slow(SHAPES, quick=(0, 3)))
def test_matches_the_definition(shape, form, boundary, dtype):
    check(*inputs(shape, form, dtype, jnp.float32), boundary)


@pytest.mark.parametrize("factor", [1, 6])
def test_offsets_beyond_the_image_and_the_band(factor):
    values, points, d_out = inputs((1, 64, 64, 1, 72, 2), "offsets", jnp.bfloat16, jnp.float32)
    check(values, points._replace(offsets=points.offsets * factor), d_out, "truncate")


def test_points_at_whole_tokens_and_at_the_border():
    values, points, d_out = inputs((1, 9, 48, 1, 8, 9), "offsets", jnp.float16, jnp.float32)
    check(values, points._replace(offsets=jnp.round(points.offsets * 2) / 2), d_out, "zeros")


def test_points_that_are_not_finite_add_nothing():
    values, points, without, d_out = points_that_are_not_finite()
    actual, expected = (forward(values, p, boundary="zeros") for p in (points, without))
    np.testing.assert_array_equal(actual, expected)
    for gradient in point_gradients(values, points, d_out, boundary="zeros"):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_operator_matches_official(case, fixture_file, monkeypatch):
    """With the sparse matrix for the gradient of the values, in float16."""
    rows, sparse = RowGather(num_warps=4), SparseMatrix(window=4, num_warps=4)
    blocks = Blocks(rows, rows, sparse)
    check_released_in_float16(fixture_file("op.npz"), case, blocks, monkeypatch)


def test_what_it_cannot_take():
    assert row_gather.why_not(16, 16, 72, 9) is None
    assert "1 x 16" in row_gather.why_not(1, 16, 72, 9)
    assert "12 channels" in row_gather.why_not(16, 16, 12, 9)
    assert "25 points" in row_gather.why_not(16, 16, 72, 25)
    assert row_gather.fits(32, 32, 72, jnp.bfloat16)
    assert not row_gather.fits(32, 32, 72, jnp.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", NAMED_SHAPES)
def test_every_named_shape_lowers_for_cuda(shape, dtype):
    values, points = named_structs(shape, dtype)
    for function, others in ((forward, ()), (point_gradients, (values,))):
        lower = functools.partial(function, boundary="zeros", interpret=False)
        text = lowered_for_cuda(lower, values, points, *others)
        assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, form, boundary, dtype",
    [
        *SHAPES,
        ((2, 16, 16, 16, 72, 9), "multiscale", "zeros", jnp.bfloat16),
        ((1, 32, 32, 4, 72, 9), "multiscale", "truncate", jnp.bfloat16),
    ],
)
def test_a_gpu_does_what_the_simulation_does(shape, form, boundary, dtype):
    if not jax.devices()[0].compute_capability.startswith("9."):
        pytest.skip("needs a GPU of compute capability 9.0")
    values, points, d_out = inputs(shape, form, dtype, jnp.float32)
    for function, others in ((forward, ()), (point_gradients, (d_out,))):
        actual = function(values, points, *others, boundary=boundary, interpret=False)
        simulated = function(values, points, *others, boundary=boundary)
        tolerance = 2e-3 if function is forward and values.dtype.itemsize == 2 else 1e-5
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(simulated), strict=True):
            assert relative_error(a, b) < tolerance
