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
