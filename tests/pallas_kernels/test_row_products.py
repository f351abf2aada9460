"""The kernels that gather rows into products: simulated, lowered for CUDA, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv import row_products
from pallas_kernels.deformable_conv.blocks import Blocks, RowProducts, SparseMatrix
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
    ((2, 2, 2, 1, 64, 1), "offsets", "zeros", jnp.float16),
    ((2, 20, 20, 2, 64, 9), "multiscale", "zeros", jnp.float16),
    ((1, 16, 16, 2, 72, 9), "multiscale", "truncate", jnp.bfloat16),
    ((1, 24, 40, 1, 72, 3), "multiscale", "zeros", jnp.bfloat16),
]
NUM_WARPS = 8


def run(function, values, points, *others, interpret=True, **options):
    h, w = values.shape[1:3]
    flat = flatten_tokens(values), flatten_points(points), *map(flatten_tokens, others)
    return function(*flat, h=h, w=w, num_warps=NUM_WARPS, interpret=interpret, **options)


def forward(values, points, **options):
    return run(row_products.forward, values, points, **options).reshape(values.shape)


def point_gradients(values, points, d_out, **options):
    like = points.per_query
    dtypes = tuple(x.dtype for x in like)
    function = row_products.point_gradients
    gradients, _ = run(function, values, points, d_out, dtypes=dtypes, **options)
    return [x.reshape(y.shape) for x, y in zip(gradients, like, strict=True)]


def check(values, points, d_out, boundary):
    """Output and weights are rounded to the values' dtype; the points' gradients are float32."""
    out, _, d_points = reference(boundary, values, points, d_out)
    assert relative_error(forward(values, points, boundary=boundary), out) < 4e-3
    actual = point_gradients(values, points, d_out, boundary=boundary)
    for a, b in zip(actual, d_points, strict=False):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("shape, form, boundary, dtype", mostly_slow(SHAPES, quick=(0, 1)))
def test_matches_the_definition(shape, form, boundary, dtype):
    check(*inputs(shape, form, dtype, jnp.float32), boundary)


@pytest.mark.parametrize("factor", [1, 6])
def test_offsets_beyond_the_image(factor):
    values, points, d_out = inputs((1, 12, 9, 1, 72, 2), "offsets", jnp.bfloat16, jnp.float32)
    check(values, points._replace(offsets=points.offsets * factor), d_out, "truncate")


def test_points_at_whole_tokens_and_at_the_border():
    values, points, d_out = inputs((1, 9, 48, 1, 64, 9), "offsets", jnp.float16, jnp.float32)
    check(values, points._replace(offsets=jnp.round(points.offsets * 2) / 2), d_out, "zeros")


def test_points_that_are_not_finite_add_nothing():
    values, points, without, d_out = points_that_are_not_finite(64)
    actual, expected = (forward(values, p, boundary="zeros") for p in (points, without))
    np.testing.assert_array_equal(actual, expected)
    for gradient in point_gradients(values, points, d_out, boundary="zeros"):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_operator_matches_official(case, fixture_file, monkeypatch):
    """With the sparse matrix for the gradient of the values, in float16."""
    rows, sparse = RowProducts(NUM_WARPS), SparseMatrix(window=4, num_warps=4)
    blocks = Blocks(rows, rows, sparse)
    check_released_in_float16(fixture_file("op.npz"), case, blocks, monkeypatch, least_channels=64)


def test_what_it_cannot_take():
    assert row_products.why_not(16, 16, 72, 9, jnp.bfloat16) is None
    assert "float32" in row_products.why_not(16, 16, 72, 9, jnp.float32)
    assert "1 x 16" in row_products.why_not(1, 16, 72, 9, jnp.bfloat16)
    assert "80 channels" in row_products.why_not(16, 16, 80, 9, jnp.bfloat16)
    assert "25 points" in row_products.why_not(16, 16, 72, 25, jnp.bfloat16)
    assert row_products.why_not(32, 32, 72, 9, jnp.bfloat16) is None
    assert "64 x 64" in row_products.why_not(64, 64, 72, 9, jnp.bfloat16)


@pytest.mark.parametrize("shape", ["XL at 256", "XL at 512", "B at 256"])
def test_every_named_shape_lowers_for_cuda(shape):
    values, points = named_structs(shape, "bfloat16")
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
