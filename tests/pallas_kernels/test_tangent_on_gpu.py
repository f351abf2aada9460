"""The derivative along a direction on a GPU: compiled kernels against plain JAX."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tangent_kernels import candidates
from pallas_kernels.deformable_conv import deformable_aggregate, multiscale_deformable_aggregate
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES
from pallas_kernels.deformable_conv.points import Offsets
from pallas_kernels.devices import is_hopper
from tests.comparison import relative_error
from tests.pallas_kernels.moving import case
from tests.pallas_kernels.test_tangent_kernels import run

pytestmark = pytest.mark.gpu


@functools.cache
def along(implementation, boundary):
    """Compiled (inputs, their tangents) -> (output, its tangent)."""

    def aggregate(values, points):
        options = dict(boundary=boundary, implementation=implementation)
        if isinstance(points, Offsets):
            return deformable_aggregate(values, *points, **options)
        options |= dict(direction_prior=points.direction_prior, max_scale=points.max_scale)
        return multiscale_deformable_aggregate(values, *points[:4], **options)

    return jax.jit(lambda primals, tangents: jax.jvp(aggregate, primals, tangents))


def in_float32(arrays):
    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)


def random_cases():
    """(shape, form, boundary, dtype, points' dtype), for kernels of all kinds."""
    rng = np.random.default_rng(0)
    channels = (72, 64, 24, 80, 5, 136)
    for n in range(18):
        h, w = rng.integers(1, 41, 2)
        shape = rng.integers(1, 4), h, w, rng.integers(1, 5), channels[n % 6], rng.integers(1, 12)
        dtype = ("bfloat16", "float16", "float32")[n // 6]
        points_dtype = dtype if n % 2 else "float32"
        form, boundary = ("offsets", "multiscale")[n % 2], ("zeros", "truncate")[n // 2 % 2]
        yield tuple(map(int, shape)), form, boundary, dtype, points_dtype


def compile_all(functions_and_arguments: list) -> list:
    """At the same time: one by one, they would take minutes."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda x: x[0].lower(*x[1:]).compile(), functions_and_arguments))


TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


def tangent_tolerance(dtype, form):
    """At whole tokens the tangent jumps, and of offsets from scales rounding may tell the side."""
    return 2e-3 if (dtype, form) == ("float32", "multiscale") else TOLERANCES[dtype]


def test_kernels_agree_with_plain_jax_at_random_shapes():
    cases = list(random_cases())
    arrays = [
        case(shape, form, dtype=dtype, points_dtype=points_dtype)[:2]
        for shape, form, _, dtype, points_dtype in cases
    ]
    exact = list(map(in_float32, arrays))
    boundaries = [boundary for _, _, boundary, *_ in cases]
    kernels, plain = (
        compile_all([(along(name, b), *x) for b, x in zip(boundaries, of, strict=True)])
        for name, of in (("pallas", arrays), ("xla", exact))
    )
    wrong = []
    for n, of in enumerate(cases):
        found, expected = kernels[n](*arrays[n]), plain[n](*exact[n])
        out, tangent = (relative_error(a, b) for a, b in zip(found, expected, strict=True))
        if not (out < TOLERANCES[of[3]] and tangent < tangent_tolerance(of[3], of[1])):
            wrong.append((of, out, tangent))
    assert not wrong


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_named_shapes_agree_with_plain_jax_and_repeat_to_the_bit(name, dtype):
    form = "offsets" if dtype == "float32" else "multiscale"
    primals, tangents, _ = case((2, *NAMED_SHAPES[name][1:]), form, dtype=dtype)
    first = jax.device_get(along("pallas", "zeros")(primals, tangents))
    exact = along("xla", "zeros")(in_float32(primals), in_float32(tangents))
    for a, b in zip(first, exact, strict=True):
        assert relative_error(a, b) < TOLERANCES[dtype]
    for _ in range(9):
        again = jax.device_get(along("pallas", "zeros")(primals, tangents))
        jax.tree.map(np.testing.assert_array_equal, first, again)


def test_every_candidate_agrees_with_plain_jax_and_repeats_to_the_bit():
    if not is_hopper():
        pytest.skip("needs a GPU of compute capability 9.0")
    shapes = [(2, h, w, min(g, 4), c, k) for _, h, w, g, c, k in NAMED_SHAPES.values()]
    shapes += [(2, 20, 24, 3, 72, 4), (1, 5, 7, 3, 64, 9)]
    arrays = {shape: case(shape, dtype="bfloat16")[:2] for shape in shapes}
    exact = {shape: along("xla", "zeros")(*in_float32(x))[1] for shape, x in arrays.items()}
    tilings = [
        (shape, tiling)
        for shape in shapes
        for tiling in candidates(*shape[1:3], *shape[4:], "bfloat16", hopper=True)
    ]
    options = dict(boundary="zeros", interpret=False)
    functions = [jax.jit(functools.partial(run, tiling, **options)) for _, tiling in tilings]
    jobs = [(f, *arrays[shape]) for f, (shape, _) in zip(functions, tilings, strict=True)]
    wrong = []
    for (shape, tiling), compiled in zip(tilings, compile_all(jobs), strict=True):
        first, *others = (jax.device_get(compiled(*arrays[shape])) for _ in range(10))
        error = relative_error(first, exact[shape])
        same = all(np.array_equal(first, x, equal_nan=True) for x in others)
        if not (error < TOLERANCES["bfloat16"] and same):
            wrong.append((shape, tiling, error, same))
    assert not wrong


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_points_that_are_not_finite_add_nothing(size, dtype):
    (values, points), (d_values, d_points), _ = case((1, size, size, 2, 72, 9), dtype=dtype)
    rng = np.random.default_rng(0)
    odd = rng.choice([np.nan, np.inf, -np.inf], points.directions.shape)
    lost = rng.random(points.weights.shape) < 0.2
    nowhere = jnp.where(lost[..., None], odd, points.directions).astype(dtype)
    bad = points._replace(directions=nowhere, weights=jnp.where(lost, jnp.nan, points.weights))
    moved = d_points._replace(weights=jnp.where(lost, jnp.inf, d_points.weights))
    without = points._replace(weights=jnp.where(lost, 0, points.weights))
    still = d_points._replace(weights=jnp.where(lost, 0, d_points.weights))
    run = along("pallas", "truncate")
    actual = run((values, bad), (d_values, moved))
    expected = run((values, without), (d_values, still))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
