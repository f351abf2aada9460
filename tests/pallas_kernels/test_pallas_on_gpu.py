"""The Pallas kernels compiled, on a GPU."""

import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv import deformable_aggregate, multiscale_deformable_aggregate
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES, model_inputs
from pallas_kernels.deformable_conv.points import Offsets
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import cast, output_and_gradients

pytestmark = pytest.mark.gpu

CASES = [  # (shape, form, boundary)
    *(((2, *shape[1:]), "multiscale", "zeros") for shape in NAMED_SHAPES.values()),
    ((2, 16, 16, 16, 72, 9), "offsets", "truncate"),
    ((2, 32, 32, 4, 72, 9), "multiscale", "truncate"),
    ((2, 5, 7, 3, 12, 9), "offsets", "zeros"),
    ((1, 24, 17, 2, 8, 4), "multiscale", "truncate"),
    ((3, 1, 1, 1, 1, 1), "offsets", "truncate"),
    ((1, 9, 40, 2, 136, 25), "multiscale", "zeros"),
    ((2, 16, 16, 2, 80, 25), "offsets", "zeros"),
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

    return jax.jit(functools.partial(output_and_gradients, aggregate))


@pytest.mark.parametrize("shape, form, boundary", CASES, ids=str)
def test_kernels_agree_with_plain_jax(shape, form, boundary):
    values, points, cotangent = model_inputs(shape, seed=1)
    points = points.to_offsets() if form == "offsets" else points
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)):
        rounded = cast(values, points, cotangent, dtype)
        expected = both("xla", boundary)(*cast(*rounded, jnp.float32))
        actual = both("pallas", boundary)(*rounded)
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < tolerance * (10 if a.ndim == 1 else 1)


def test_memory_is_that_of_inputs_outputs_and_one_more_array():
    arrays = cast(*model_inputs((2, 32, 32, 16, 72, 9)), jnp.bfloat16)
    memory = both("pallas", "zeros").lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= arrays[0].nbytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ten_runs_give_the_same_bits(dtype):
    for shape, _, _ in CASES[:2]:
        arrays = cast(*model_inputs(shape), dtype)
        first = jax.device_get(both("pallas", "zeros")(*arrays))
        for _ in range(9):
            again = jax.device_get(both("pallas", "zeros")(*arrays))
            jax.tree.map(np.testing.assert_array_equal, first, again)


def test_points_that_are_not_finite_add_nothing():
    values, points, cotangent = model_inputs((2, 20, 24, 2, 24, 9))
    offsets, weights = (np.array(x) for x in points.to_offsets())
    bad = np.random.default_rng(0).random(weights.shape) < 0.3
    odd = np.random.default_rng(1).choice([np.nan, np.inf, -3e38], (*weights.shape, 2))
    points = Offsets(np.where(bad[..., None], odd, offsets).astype(np.float32), weights)
    actual = both("pallas", "zeros")(values, points, cotangent)
    points = Offsets(np.where(bad[..., None], 0, offsets), np.where(bad, 0, weights))
    expected = both("xla", "zeros")(values, points, cotangent)
    for a, b in zip(actual[:2], expected[:2], strict=True):
        assert relative_error(a, b) < 1e-5
    for a, b in zip(actual[2:], expected[2:], strict=True):
        assert not np.asarray(a)[bad].any()
        assert relative_error(np.asarray(a)[~bad], np.asarray(b)[~bad]) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_numbers_that_are_not_finite_are_lost_with_their_points(implementation, size, dtype):
    values, points, cotangent = cast(*model_inputs((1, size, size, 2, 72, 9)), dtype)
    rng = np.random.default_rng(0)
    cause = rng.integers(10, size=points.weights.shape)  # 0: directions, and weights; 1: scales
    odd = rng.choice([np.nan, np.inf, -np.inf], points.directions.shape).astype(dtype)
    bad = points._replace(
        directions=jnp.where((cause == 0)[..., None], odd, points.directions),
        scales=jnp.where(cause == 1, jnp.nan, points.scales),
        weights=jnp.where(cause == 0, jnp.nan, points.weights),
    )
    lost = cause < 2
    without = points._replace(weights=jnp.where(lost, 0, points.weights))
    run = both(implementation, "truncate")
    actual, expected = (jax.device_get(run(values, x, cotangent)) for x in (bad, without))
    for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if n in (2, 3, 4):  # of directions, scales and weights
            assert not a[lost].any()
            a, b = a[~lost], b[~lost]
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("form", ["multiscale", "offsets"])
@pytest.mark.parametrize("shape", [shape for shape, *_ in CASES[:3]] + [CASES[5][0]], ids=str)
@pytest.mark.parametrize("size", [1e5, 1e-6])
def test_float16_with_float32_weights_of_any_size(shape, size, form):
    values, points, cotangent = model_inputs(shape, seed=1)
    points = points.to_offsets() if form == "offsets" else points
    values, cotangent = (jnp.asarray(x / size**0.5, jnp.float16) for x in (values, cotangent))
    points = points._replace(weights=points.weights * size)
    expected = both("xla", "truncate")(*cast(values, points, cotangent, jnp.float32))
    for implementation in ("xla", "pallas"):
        actual = both(implementation, "truncate")(values, points, cotangent)
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(70_000, 2, 3, 1, 8, 2), (2, 2, 3, 70_000, 8, 2)], ids=str)
def test_batches_and_groups_beyond_cudas_grid(shape, dtype):
    arrays = cast(*model_inputs(shape, seed=1), dtype)
    expected = both("xla", "zeros")(*cast(*arrays, jnp.float32))
    for implementation in ("pallas", "xla"):
        actual = both(implementation, "zeros")(*arrays)
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < (1e-5 if dtype == jnp.float32 else 1e-2)


def test_more_elements_than_the_kernels_indices_reach():
    if jax.devices()[0].memory_stats()["bytes_limit"] < 50e9:
        pytest.skip("needs 50 GB of GPU memory")
    small = cast(*model_inputs((3, 8, 8, 4, 64, 1), seed=1), jnp.float16)
    copies = 2**31 // small[0][:2].size  # and one image more than 2^31 elements

    def many(x):
        return jnp.concatenate([jnp.tile(x[:2], (copies, *[1] * (x.ndim - 1))), x[2:]])

    values, points, cotangent = small
    per_query = dict(zip(points._fields, map(many, points.per_query), strict=False))
    large = many(values), points._replace(**per_query), many(cotangent)
    *actual, _ = both(None, "zeros")(*large)
    *expected, _ = both("pallas", "zeros")(*small)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a[-3:], b) < 2e-3
    with pytest.raises(ValueError, match="expected at most 2147483647"):
        jax.eval_shape(both("pallas", "zeros"), *large)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
def test_no_access_is_out_of_bounds(repository):
    """Offsets that lead far away, in images that no tile fits, in the offset and the fused form."""
    program = """
import jax, numpy as np
from pallas_kernels.deformable_conv.named_shapes import model_inputs
from tests.pallas_kernels.aggregation import cast
from tests.pallas_kernels.test_pallas_on_gpu import both
for shape in ((1, 5, 7, 2, 12, 9), (1, 9, 40, 1, 8, 4)):
    values, points, cotangent = cast(*model_inputs(shape, widening=30.0), "bfloat16")
    for form in (points, points.to_offsets()):
        jax.block_until_ready(both("pallas", "zeros")(values, form, cotangent))
"""
    command = ["compute-sanitizer", "--tool=memcheck", "--error-exitcode=9", sys.executable, "-c"]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [*command, program], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-3000:]
