"""The gradient of the values from sorted points: simulated, lowered for CUDA, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv import list_gradient, point_lists
from pallas_kernels.deformable_conv.blocks import Blocks, PointLists, RowGather
from pallas_kernels.deformable_conv.points import Offsets, flatten_points, flatten_tokens
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
    ((1, 5, 7, 3, 72, 4), "multiscale", "truncate", jnp.bfloat16),  # a strip that is not full
    ((2, 2, 2, 1, 64, 1), "offsets", "zeros", jnp.float16),
    ((1, 20, 20, 2, 64, 9), "multiscale", "zeros", jnp.float16),
    ((1, 16, 16, 1, 72, 9), "multiscale", "truncate", jnp.float32),
    ((1, 12, 40, 1, 80, 3), "multiscale", "zeros", jnp.bfloat16),
    ((3, 9, 10, 1, 8, 2), "offsets", "truncate", jnp.float32),
    ((1, 6, 17, 1, 128, 2), "offsets", "zeros", jnp.bfloat16),
    ((1, 7, 9, 1, 24, 5), "multiscale", "zeros", jnp.float16),
]


def values_gradient(points, d_out, *, boundary, interpret=True):
    h, w = d_out.shape[1:3]
    options = dict(h=h, w=w, boundary=boundary, num_warps=4, interpret=interpret)
    flat = flatten_points(points), flatten_tokens(d_out)
    return list_gradient.values_gradient(*flat, **options).reshape(d_out.shape)


def check(values, points, d_out, boundary):
    """The gradient is rounded to the values' dtype, and in 16 bits the weights are, too."""
    _, d_values, _ = reference(boundary, values, points, d_out)
    tolerance = 1e-5 if values.dtype == jnp.float32 else 4e-3
    assert relative_error(values_gradient(points, d_out, boundary=boundary), d_values) < tolerance


@pytest.mark.parametrize("shape, form, boundary, dtype", mostly_slow(SHAPES, quick=(4, 7)))
def test_matches_the_definition(shape, form, boundary, dtype):
    check(*inputs(shape, form, dtype, jnp.float32), boundary)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("factor", [0, 1, 6])
def test_offsets_from_none_to_beyond_the_image(factor, dtype):
    values, points, d_out = inputs((1, 12, 9, 1, 72, 2), "offsets", dtype, jnp.float32)
    check(values, points._replace(offsets=points.offsets * factor), d_out, "truncate")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_all_points_at_one_place(dtype):
    """One token has a long list; all others have none."""
    values, points, d_out = inputs((1, 8, 11, 1, 64, 3), "offsets", dtype, jnp.float32)
    y, x = np.mgrid[:8, :11].astype(np.float32)
    offsets = np.stack([4.25 - x, 3.5 - y], axis=-1)[None, :, :, None, None]
    offsets = jnp.asarray(np.broadcast_to(offsets, points.offsets.shape))
    check(values, points._replace(offsets=offsets), d_out, "zeros")


def test_points_at_whole_tokens_and_at_the_border():
    values, points, d_out = inputs((1, 9, 20, 1, 64, 9), "offsets", jnp.float16, jnp.float32)
    check(values, points._replace(offsets=jnp.round(points.offsets * 2) / 2), d_out, "zeros")


def test_points_that_are_not_finite_add_nothing():
    _, points, without, d_out = points_that_are_not_finite(64)
    actual, expected = (values_gradient(p, d_out, boundary="zeros") for p in (points, without))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_gradient_that_is_not_finite_stays_near_its_query(dtype):
    """Lists are filled up with points that have no weight, which must not spread it."""
    _, points, d_out = inputs((1, 16, 16, 1, 72, 3), "offsets", dtype, jnp.float32)
    offsets = jnp.clip(points.offsets, -1.5, 1.5)
    d_out = d_out.at[0, 8, 8].set(jnp.nan)
    d_values = np.asarray(
        values_gradient(Offsets(offsets, points.weights), d_out, boundary="zeros")
    )
    y, x = np.mgrid[:16, :16]
    far = (abs(y - 8) > 3) | (abs(x - 8) > 3)
    assert np.isnan(d_values[0][~far]).any()
    assert np.isfinite(d_values[0][far]).all()


def test_lists_hold_every_point_once():
    h, w, num_points = 6, 10, 4
    values, points, _ = inputs((1, h, w, 1, 8, num_points), "offsets", jnp.float32, jnp.float32)
    flat = flatten_tokens(values), flatten_points(points)
    lists = point_lists.sort(*flat, h=h, w=w, boundary="zeros", interpret=True)
    queries, weights, starts = (np.asarray(x)[0, 0] for x in lists)
    assert (np.diff(starts) >= 0).all()
    assert starts[-1] * point_lists.FOUR <= point_lists.capacity(h * w, num_points)

    expected = np.zeros(h * w)  # the sum of each query's weights that lie inside the image
    offsets, own_weights = (np.asarray(x, np.float64)[0, :, :, 0] for x in points)
    y, x = np.mgrid[:h, :w][..., None]
    for size, position in ((w, x + offsets[..., 0]), (h, y + offsets[..., 1])):
        base = np.floor(position)
        first, second = ((base + n >= 0) & (base + n < size) for n in range(2))
        own_weights = own_weights * (first * (1 - position + base) + second * (position - base))
    expected = own_weights.sum(-1).reshape(-1)
    found = np.bincount(
        queries[: starts[-1] * 4], weights[: starts[-1] * 4].sum(-1), minlength=h * w
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_operator_matches_official(case, fixture_file, monkeypatch):
    """With row gathers for all else, in float16."""
    blocks = Blocks(RowGather(num_warps=4), RowGather(num_warps=4), PointLists(num_warps=4))
    check_released_in_float16(fixture_file("op.npz"), case, blocks, monkeypatch)


def test_what_it_cannot_take():
    for dtype in (jnp.bfloat16, jnp.float32):
        assert list_gradient.why_not(64, 64, 72, 9, dtype) is None
        assert list_gradient.why_not(16, 16, 64, 9, dtype) is None
        assert "1 x 16" in list_gradient.why_not(1, 16, 72, 9, dtype)
        assert "76 channels" in list_gradient.why_not(16, 16, 76, 9, dtype)
        assert "136 channels" in list_gradient.why_not(16, 16, 136, 9, dtype)
        assert "25 points" in list_gradient.why_not(16, 16, 72, 25, dtype)
        assert "128 x 128" in list_gradient.why_not(128, 128, 72, 9, dtype)
    # 12 places of 10 bytes and a start of 4 for each of 256 tokens, one start more, 32 places more
    assert "takes 32068 bytes, and an image 20480" in list_gradient.why_not(
        16, 16, 40, 9, jnp.bfloat16
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", ["XL at 512", "XL at 1024", "B at 256"])
def test_every_named_shape_lowers_for_cuda(shape, dtype):
    values, points = named_structs(shape, dtype)
    lower = functools.partial(values_gradient, boundary="zeros", interpret=False)
    text = lowered_for_cuda(lower, points, values)
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, form, boundary, dtype",
    [
        *SHAPES,
        ((2, 16, 16, 16, 72, 9), "multiscale", "zeros", jnp.bfloat16),
        ((1, 32, 32, 4, 72, 9), "multiscale", "truncate", jnp.float32),
        ((1, 64, 64, 1, 64, 9), "multiscale", "zeros", jnp.bfloat16),
    ],
)
def test_a_gpu_does_what_the_simulation_does(shape, form, boundary, dtype):
    if not jax.devices()[0].compute_capability.startswith("9."):
        pytest.skip("needs a GPU of compute capability 9.0")
    _, points, d_out = inputs(shape, form, dtype, jnp.float32)
    actual, simulated = (
        values_gradient(points, d_out, boundary=boundary, interpret=interpret)
        for interpret in (False, True)
    )
    assert relative_error(actual, simulated) < (1e-5 if dtype == jnp.float32 else 2e-3)
