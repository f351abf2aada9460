"""The kernels of the derivative along a direction: simulated, and lowered for CUDA."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv.blocks import RowProducts, RowSlices
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES
from pallas_kernels.deformable_conv.pallas import kernel_of
from pallas_kernels.deformable_conv.points import TANGENT_OF, flatten_points, flatten_tokens
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import lowered_for_cuda, mostly_slow, named_structs
from tests.pallas_kernels.moving import case, exactly

SHAPES = [
    ((1, 5, 7, 1, 72, 3), "multiscale", "truncate", "bfloat16"),  # queries left over
    ((1, 2, 2, 2, 64, 1), "offsets", "zeros", "float16"),
    ((1, 16, 16, 1, 72, 9), "multiscale", "zeros", "bfloat16"),
    ((1, 9, 40, 1, 64, 3), "offsets", "truncate", "bfloat16"),
]
KERNELS = {"products": RowProducts(num_warps=4), "slices": RowSlices(num_warps=4)}


def run(tiling, primals, tangents, *, boundary, interpret=True):
    (values, points), (d_values, d_points) = primals, tangents
    h, w = values.shape[1:3]
    form = TANGENT_OF[type(points)]
    along = form(*d_points[: len(form._fields)])
    arrays = flatten_tokens(values), flatten_points(points), flatten_tokens(d_values)
    kernel = kernel_of("tangent", tiling, h, w)
    out = kernel(*arrays, flatten_points(along), boundary=boundary, interpret=interpret)
    return out.reshape(values.shape)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape, form, boundary, dtype", mostly_slow(SHAPES, quick=(0,)))
def test_matches_the_definition(kernel, shape, form, boundary, dtype):
    """Weights and the result are rounded to the values' dtype."""
    primals, tangents, _ = case(shape, form, dtype=dtype, points_dtype=jnp.float32)
    actual = run(KERNELS[kernel], primals, tangents, boundary=boundary)
    assert relative_error(actual, exactly(boundary, primals, tangents)) < 4e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_points_that_are_not_finite_add_nothing(kernel):
    (values, points), (d_values, d_points), _ = case((1, 4, 5, 1, 64, 2), dtype="bfloat16")
    rng = np.random.default_rng(0)
    odd = rng.choice(np.float32([np.nan, np.inf, -np.inf]), points.directions.shape)
    lost = rng.random(points.weights.shape) < 0.2
    bad = points._replace(
        directions=jnp.where(lost[..., None], odd, points.directions).astype("bfloat16"),
        weights=jnp.where(lost, jnp.nan, points.weights),
    )
    moved = d_points._replace(weights=jnp.where(lost, jnp.inf, d_points.weights))
    without = points._replace(weights=jnp.where(lost, 0, points.weights))
    still = d_points._replace(weights=jnp.where(lost, 0, d_points.weights))
    actual, expected = (
        run(KERNELS[kernel], (values, p), (d_values, d), boundary="zeros")
        for p, d in ((bad, moved), (without, still))
    )
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", NAMED_SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_named_shape_lowers_for_cuda(kernel, name):
    tiling = KERNELS[kernel]
    h = NAMED_SHAPES[name][1]
    if kernel == "products" and h > 16:
        pytest.skip("does not fit into shared memory")
    arrays = named_structs(name, "bfloat16")
    lower = functools.partial(run, tiling, boundary="zeros", interpret=False)
    text = lowered_for_cuda(lower, arrays, arrays)
    assert text.count("custom_call @mosaic_gpu") == {"products": 1, "slices": 3}[kernel]
