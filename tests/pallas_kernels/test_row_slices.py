"""The forward from slices of the channels: simulated, lowered for CUDA, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv import row_slices
from pallas_kernels.deformable_conv.blocks import Blocks, RowGather, RowSlices, SparseMatrix, choose
from pallas_kernels.deformable_conv.points import flatten_points, flatten_tokens
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import (
    check_released_in_float16,
    inputs,
    lowered_for_cuda,
    named_structs,
    points_that_are_not_finite,
    reference,
)

SHAPES = [
    ((1, 5, 7, 3, 72, 4), "multiscale", "truncate", jnp.bfloat16),  # queries left over
    ((2, 2, 2, 1, 64, 1), "offsets", "zeros", jnp.float16),
    ((2, 20, 20, 2, 64, 9), "multiscale", "zeros", jnp.float16),
    ((1, 16, 16, 2, 72, 9), "multiscale", "truncate", jnp.bfloat16),
    ((1, 9, 40, 1, 16, 3), "multiscale", "zeros", jnp.bfloat16),  # a slice that is not full
    ((1, 64, 64, 1, 80, 2), "offsets", "zeros", jnp.bfloat16),
]


def forward(values, points, *, boundary, num_warps=4, interpret=True):
    h, w = values.shape[1:3]
    options = dict(h=h, w=w, boundary=boundary, num_warps=num_warps, interpret=interpret)
    out = row_slices.forward(flatten_tokens(values), flatten_points(points), **options)
    return out.reshape(values.shape)


def check(values, points, d_out, boundary, **options):
    """Output and weights are rounded to the values' dtype."""
    out, _, _ = reference(boundary, values, points, d_out)
    assert relative_error(forward(values, points, boundary=boundary, **options), out) < 4e-3


@pytest.mark.parametrize("shape, form, boundary, dtype", SHAPES)
def test_matches_the_definition(shape, form, boundary, dtype):
    check(*inputs(shape, form, dtype, jnp.float32), boundary)


@pytest.mark.parametrize("num_warps", [8, 16])
def test_warps_without_queries(num_warps):
    arrays = inputs((1, 5, 7, 1, 72, 2), "offsets", jnp.bfloat16, jnp.float32)
    check(*arrays, "zeros", num_warps=num_warps)


@pytest.mark.parametrize("factor", [1, 6])
def test_offsets_beyond_the_image(factor):
    values, points, d_out = inputs((1, 12, 9, 1, 72, 2), "offsets", jnp.bfloat16, jnp.float32)
    check(values, points._replace(offsets=points.offsets * factor), d_out, "truncate")


def test_points_at_whole_tokens_and_at_the_border():
    values, points, d_out = inputs((1, 9, 48, 1, 64, 9), "offsets", jnp.float16, jnp.float32)
    check(values, points._replace(offsets=jnp.round(points.offsets * 2) / 2), d_out, "zeros")


def test_points_that_are_not_finite_add_nothing():
    values, points, without, _ = points_that_are_not_finite(64)
    actual, expected = (forward(values, p, boundary="zeros") for p in (points, without))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_operator_matches_official(case, fixture_file, monkeypatch):
    """With other kernels for the gradients, in float16."""
    blocks = Blocks(RowSlices(4), RowGather(4), SparseMatrix(window=4, num_warps=4))
    check_released_in_float16(fixture_file("op.npz"), case, blocks, monkeypatch)


def test_what_it_cannot_take():
    assert row_slices.why_not(64, 64, 72, 9, jnp.bfloat16) is None
    assert row_slices.why_not(64, 64, 128, 9, jnp.float16) is None
    assert "float32" in row_slices.why_not(64, 64, 72, 9, jnp.float32)
    assert "1 x 64" in row_slices.why_not(1, 64, 72, 9, jnp.bfloat16)
    assert "76 channels" in row_slices.why_not(64, 64, 76, 9, jnp.bfloat16)
    assert "136 channels" in row_slices.why_not(64, 64, 136, 9, jnp.bfloat16)
    assert "25 points" in row_slices.why_not(64, 64, 72, 25, jnp.bfloat16)
    assert "80 x 80" in row_slices.why_not(80, 80, 72, 9, jnp.bfloat16)
    assert "409600 bytes, and an image 393216" in row_slices.why_not(64, 64, 48, 9, jnp.bfloat16)


def test_they_are_chosen_for_full_slices_and_where_rows_do_not_fit():
    def is_chosen(size, channels=72, dtype=jnp.bfloat16, hopper=True):
        return isinstance(choose(size, size, channels, 9, dtype, hopper=hopper).forward, RowSlices)

    assert [is_chosen(size) for size in (16, 32, 64)] == [False, True, True]
    assert [is_chosen(size, 64) for size in (16, 32, 64)] == [False, False, True]
    assert not is_chosen(64, dtype=jnp.float32)
    assert not is_chosen(64, hopper=False)


def test_fewer_warps_where_two_blocks_share_a_multiprocessor():
    sizes = {
        size: choose(size, size, 72, 9, jnp.bfloat16, hopper=True).forward for size in (32, 40, 48)
    }
    assert [x.num_warps for x in sizes.values()] == [8, 8, 12]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name, num_warps", [("XL at 512", 8), ("XL at 1024", 12)])
def test_the_named_shapes_lower_for_cuda(name, num_warps, dtype):
    values, points = named_structs(name, dtype)
    lower = functools.partial(forward, boundary="zeros", num_warps=num_warps, interpret=False)
    assert lowered_for_cuda(lower, values, points).count("custom_call @mosaic_gpu") == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, form, boundary, dtype",
    [
        *SHAPES,
        ((1, 40, 48, 4, 72, 9), "multiscale", "zeros", jnp.bfloat16),
        ((1, 64, 64, 2, 72, 9), "multiscale", "truncate", jnp.bfloat16),
    ],
)
def test_a_gpu_does_what_the_simulation_does(shape, form, boundary, dtype):
    if not jax.devices()[0].compute_capability.startswith("9."):
        pytest.skip("needs a GPU of compute capability 9.0")
    values, points, _ = inputs(shape, form, dtype, jnp.float32)
    actual, simulated = (
        forward(values, points, boundary=boundary, num_warps=12, interpret=interpret)
        for interpret in (False, True)
    )
    assert relative_error(actual, simulated) < 2e-3
