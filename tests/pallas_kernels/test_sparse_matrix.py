"""The kernels that build the matrix in shared memory: simulated, lowered for CUDA, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv import sparse_matrix, sparse_transpose
from pallas_kernels.deformable_conv.blocks import Blocks, RowGather, SparseMatrix
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES
from pallas_kernels.deformable_conv.points import flatten_points, flatten_tokens
from pallas_kernels.deformable_conv.sparse_transpose import extents_of
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
    ((1, 5, 7, 3, 72, 4), "multiscale", "truncate", 4),  # chunks left over; queries left over
    ((2, 1, 1, 1, 8, 1), "offsets", "zeros", 4),
    ((2, 20, 20, 2, 24, 9), "multiscale", "zeros", 4),  # seven windows, the last one not full
    ((1, 9, 48, 1, 8, 9), "multiscale", "truncate", 8),
    ((1, 24, 24, 1, 72, 4), "offsets", "zeros", 4),
]


def run(function, values, points, *others, boundary, window, interpret=True, **options):
    h, w = values.shape[1:3]
    return function(
        *others,
        h=h,
        w=w,
        boundary=boundary,
        window=window,
        num_warps=4,
        interpret=interpret,
        **options,
    )


def point_gradients(values, points, d_out, **options):
    like = points.per_query
    flat = flatten_tokens(values), flatten_points(points), flatten_tokens(d_out)
    dtypes = tuple(x.dtype for x in like)
    function = sparse_matrix.point_gradients
    gradients, _ = run(function, values, points, *flat, dtypes=dtypes, **options)
    return [x.reshape(y.shape) for x, y in zip(gradients, like, strict=True)]


def values_gradient(values, points, d_out, **options):
    flat = flatten_points(points), flatten_tokens(d_out)
    gradient = run(sparse_transpose.values_gradient, values, points, *flat, **options)
    return gradient.reshape(values.shape)


def check(values, points, d_out, tolerance, **options):
    """Holds both to the definition; the gradients of the points, in float32, to 1e-5."""
    _, d_values, d_points = reference(options["boundary"], values, points, d_out)
    assert relative_error(values_gradient(values, points, d_out, **options), d_values) < tolerance
    for a, b in zip(point_gradients(values, points, d_out, **options), d_points, strict=False):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("shape, form, boundary, window", mostly_slow(SHAPES, quick=(0, 1)))
def test_matches_the_definition(shape, form, boundary, window):
    """The matrix is rounded to 16 bits. In the gradients of float32 points nothing is."""
    values, points, d_out = inputs(shape, form, jnp.bfloat16, jnp.float32)
    check(values, points, d_out, 5e-3, boundary=boundary, window=window)


def test_offsets_far_wider_than_a_window():
    values, points, d_out = inputs((1, 9, 48, 1, 8, 9), "offsets", jnp.float16, jnp.float32)
    points = points._replace(offsets=points.offsets * 5)
    check(values, points, d_out, 1e-3, boundary="zeros", window=4)


def test_points_at_whole_tokens_and_at_the_border():
    """Of a point's corners those without weight, moved inside, lie on others."""
    values, points, d_out = inputs((1, 9, 48, 1, 8, 9), "offsets", jnp.float16, jnp.float32)
    points = points._replace(offsets=jnp.round(points.offsets * 2) / 2)
    check(values, points, d_out, 1e-3, boundary="zeros", window=4)


def test_points_that_are_not_finite_add_nothing():
    values, points, without, d_out = points_that_are_not_finite()
    options = dict(boundary="zeros", window=4)
    actual, expected = (values_gradient(values, p, d_out, **options) for p in (points, without))
    np.testing.assert_array_equal(actual, expected)
    for gradient in point_gradients(values, points, d_out, **options):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("boundary", ["zeros", "truncate"])
def test_extents_hold_every_corner(boundary):
    """XLA's hold those of the kernel, which hold every corner inside the image, and little else."""
    shape = (1, 9, 32, 2, 8, 3)
    values, points, d_out = inputs(shape, "multiscale", jnp.bfloat16, jnp.float32)
    options = dict(h=9, w=32, boundary=boundary)
    of_xla = extents_of(flatten_points(points), **options)
    flat = flatten_tokens(values), flatten_points(points), flatten_tokens(d_out)
    dtypes = (jnp.float32,) * 3
    blocks = dict(dtypes=dtypes, window=4, num_warps=4, interpret=True)
    _, of_kernel = sparse_matrix.point_gradients(*flat, **blocks, **options)
    offsets = np.asarray(points.to_offsets().offsets)  # [1, h, w, G, K, 2]
    y, x = np.indices((9, 32))[:, None, :, :, None, None]
    base = {"zeros": np.floor, "truncate": np.trunc}[boundary]
    x, y = base(x + offsets[..., 0]), base(y + offsets[..., 1])
    inside = (x >= 0) & (x < 32) & (y >= 0) & (y < 9)
    token = np.where(inside, y * 32 + x, np.nan)[0]  # a tile is a row of the image
    lowest, highest = np.nanmin(token, axis=(1, 3)).T, np.nanmax(token, axis=(1, 3)).T
    for found, slack in ((of_kernel, 0), (of_xla, 1)):
        assert (np.asarray(found.lowest)[0] <= lowest).all()
        assert (np.asarray(found.highest)[0] >= highest).all()
        distance = np.asarray(of_kernel.lowest) - np.asarray(found.lowest)
        assert distance.min() >= 0 and distance.max() <= slack * 33
    assert np.asarray(of_kernel.lowest).max() > 32


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_operator_matches_official(case, fixture_file, monkeypatch):
    """With row gathers for the forward, where a choice of blocks takes them."""
    sparse = SparseMatrix(window=4, num_warps=4)
    blocks = Blocks(RowGather(num_warps=4), sparse, sparse)
    check_released_in_float16(fixture_file("op.npz"), case, blocks, monkeypatch)


def test_what_it_cannot_take():
    assert sparse_matrix.why_not(16, 16, 72, 9, jnp.bfloat16) is None
    assert "float32" in sparse_matrix.why_not(16, 16, 72, 9, jnp.float32)
    assert "12 channels" in sparse_matrix.why_not(16, 16, 12, 9, jnp.bfloat16)
    assert "25 points" in sparse_matrix.why_not(16, 16, 72, 25, jnp.bfloat16)
    assert sparse_matrix.fits(32, 32, 72, window=4, num_warps=8)
    assert not sparse_matrix.fits(64, 64, 72, window=4, num_warps=8)


@pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, "bfloat16") for shape in NAMED_SHAPES), ("XL at 256", "float16")],
)
def test_every_named_shape_lowers_for_cuda(shape, dtype):
    values, points = named_structs(shape, dtype)
    h, w, _, c = values.shape[1:]
    if sparse_matrix.why_not(h, w, c, 9, dtype) is not None:
        pytest.skip(sparse_matrix.why_not(h, w, c, 9, dtype))
    options = dict(boundary="zeros", window=4, interpret=False)
    functions = [values_gradient]
    if sparse_matrix.fits(h, w, c, window=4, num_warps=4):
        functions.append(point_gradients)
    for function in functions:
        text = lowered_for_cuda(functools.partial(function, **options), values, points, values)
        assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, form, boundary, window",
    [
        *SHAPES,
        ((2, 16, 16, 16, 72, 9), "multiscale", "zeros", 8),
        ((1, 32, 32, 4, 72, 9), "multiscale", "truncate", 4),
    ],
)
def test_a_gpu_does_what_the_simulation_does(shape, form, boundary, window):
    if not jax.devices()[0].compute_capability.startswith("9."):
        pytest.skip("needs a GPU of compute capability 9.0")
    values, points, d_out = inputs(shape, form, jnp.bfloat16, jnp.float32)
    options = dict(boundary=boundary, window=window)
    for function, tolerance in ((values_gradient, 2e-3), (point_gradients, 1e-5)):
        actual = function(values, points, d_out, interpret=False, **options)
        simulated = function(values, points, d_out, **options)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(simulated), strict=True):
            assert relative_error(a, b) < tolerance
