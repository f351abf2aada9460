"""Numbers that are not finite, in plain JAX and in every family of kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deformable_conv import multiscale_deformable_aggregate, pallas, points
from pallas_kernels.deformable_conv.blocks import (
    Blocks,
    Gather,
    PointLists,
    Product,
    RowGather,
    RowProducts,
    RowSlices,
    SparseMatrix,
    TransposedProduct,
)
from pallas_kernels.deformable_conv.xla import deformable_aggregate_xla
from tests.pallas_kernels.aggregation import inputs, output_and_gradients, replace_in_pallas

SHAPE = (2, 4, 8, 2, 64, 3)  # B, h, w, G, C, K
WHOLE, HALF = (4, 8), (2, 8)  # tiles
SPARSE = SparseMatrix(window=4, num_warps=4)
FAMILIES = {
    "xla": None,
    "row gather, lists": Blocks(RowGather(4), RowGather(4), PointLists(4)),
    "row products, sparse": Blocks(RowProducts(8), RowProducts(8), SPARSE),
    "row slices, sparse": Blocks(RowSlices(4), SPARSE, SPARSE),
    "products": Blocks(
        Product(WHOLE, WHOLE, 4),
        Product(WHOLE, WHOLE, 4),
        TransposedProduct(WHOLE, WHOLE, tiles_per_program=1, skip=False, num_warps=4),
    ),
    "gather, skipping": Blocks(
        Gather(WHOLE, 32, 4),
        Product(WHOLE, HALF, 4),
        TransposedProduct(WHOLE, HALF, tiles_per_program=1, skip=True, num_warps=4),
    ),
}
CASES = [
    ("xla", "float32", "zeros"),
    ("xla", "bfloat16", "truncate"),
    ("row gather, lists", "float32", "zeros"),
    ("row gather, lists", "bfloat16", "truncate"),
    ("row products, sparse", "bfloat16", "zeros"),
    pytest.param(("row products, sparse", "bfloat16", "truncate"), marks=pytest.mark.slow),
    pytest.param(("row slices, sparse", "bfloat16", "zeros"), marks=pytest.mark.slow),
    ("row slices, sparse", "bfloat16", "truncate"),
    ("products", "bfloat16", "truncate"),
    ("gather, skipping", "bfloat16", "zeros"),
]


@functools.cache
def program(family: str, boundary: str):
    def function(values, points):
        if FAMILIES[family] is None:
            return deformable_aggregate_xla(values, points, boundary)
        return pallas.deformable_aggregate_pallas(values, points, boundary, True)

    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(functools.partial(output_and_gradients, function), compiler_options=options)


@pytest.fixture(params=CASES, ids=", ".join)
def case(request, monkeypatch):
    """((values, points, d out), a function of them -> (output, *gradients))."""
    family, dtype, boundary = request.param
    replace_in_pallas(monkeypatch, choose=lambda *_, **__: FAMILIES[family])
    arrays = inputs(SHAPE, "multiscale", dtype, jnp.float32)
    return arrays, lambda *arrays: jax.device_get(program(family, boundary)(*arrays))


def changed(points, **entries):
    """`points` with fields changed: of each, {index: number}."""
    fields = {name: np.array(getattr(points, name)) for name in entries}
    for name, numbers in entries.items():
        for index, number in numbers.items():
            fields[name][index] = number
    return points._replace(**fields)


# What is changed, and which points have offsets that are not finite then.
LOST = {
    "their own": (
        {
            "directions": {
                (0, 1, 2, 1, 0, 0): np.nan,
                (1, 3, 3, 0, 2, 1): -np.inf,
                (0, 0, 0, 0, 0, 0): np.inf,
            },
            "scales": {(1, 0, 0, 1, 1): np.nan, (0, 2, 7, 0, 1): np.nan},
            "weights": {(0, 2, 7, 0, 1): np.nan, (0, 0, 0, 0, 0): -np.inf},
        },
        [(0, 1, 2, 1, 0), (1, 3, 3, 0, 2), (0, 0, 0, 0, 0), (1, 0, 0, 1, 1), (0, 2, 7, 0, 1)],
    ),
    "priors": (
        {"scale_prior": {1: np.nan}, "direction_prior": {(2, 0): np.inf}},
        [(..., 1, slice(None)), (..., 2)],
    ),
    "the largest scale": ({"max_scale": {1: np.nan}}, [...]),
    "an infinite largest scale": ({"max_scale": {0: np.inf}}, [...]),
}


def test_points_that_are_not_finite_are_lost_and_nothing_else(case):
    """They change nothing for the others, and have gradients of zero."""
    (values, points, d_out), run = case
    for cause, (entries, where) in LOST.items():
        lost = np.zeros(points.weights.shape, bool)
        for index in where:
            lost[index] = True
        without = points._replace(weights=np.where(lost, np.float32(0), points.weights))
        expected = list(run(values, without, d_out))
        for n in (2, 3, 4):  # of directions, scales and weights
            expected[n] = np.where(lost[..., None] if n == 2 else lost, 0, expected[n])
        actual = run(values, changed(points, **entries), d_out)
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=cause)


def test_infinite_scales_and_scale_priors_are_finite_fractions(case):
    """Of 1 and 0, but where their sum is not a number."""
    (values, points, d_out), run = case
    lost = (0, 3, 3, 1, 2)
    scales = {(0, 1, 1, 0, 0): np.inf, (1, 2, 2, 0, 1): -np.inf, lost: np.inf}
    infinite = changed(points, scales=scales, scale_prior={1: -np.inf})
    limits = {index: np.sign(number) * 1e3 for index, number in scales.items()}
    finite = changed(points, scales=limits, scale_prior={1: -1e4}, weights={lost: 0.0})
    actual, expected = run(values, infinite, d_out), list(run(values, finite, d_out))
    expected[4] = np.array(expected[4])
    expected[4][lost] = 0  # of weights
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("name", ["values", "weights", "d out"])
def test_other_numbers_stay_in_their_image_and_group(case, name):
    (values, points, d_out), run = case
    clean = run(values, points, d_out)
    if name == "values":
        values = values.at[0, 1, 1, 0, 5].set(jnp.nan).at[0, 3, 7, 0, 63].set(jnp.inf)
    elif name == "weights":
        points = changed(points, weights={(0, 1, 1, 0, 0): np.nan, (0, 0, 0, 0, 2): np.inf})
    else:
        d_out = d_out.at[0, 2, 3, 0, 0].set(jnp.nan).at[0, 0, 0, 0, 9].set(-jnp.inf)
    *results, d_scale_prior = run(values, points, d_out)
    assert not all(np.isfinite(np.float32(x)).all() for x in results)
    assert d_scale_prior[1] == clean[-1][1]
    for a, b in zip(results, clean, strict=False):
        np.testing.assert_array_equal(a[1], b[1])
        np.testing.assert_array_equal(a[0, :, :, 1], b[0, :, :, 1])


def test_the_smallest_call_keeps_its_gradients():
    """Of one of four queries' directions, in plain JAX, by the way in."""
    ones = jnp.ones((1, 2, 2, 1, 1))
    directions = jnp.zeros((1, 2, 2, 1, 1, 2)).at[0, 0, 0, 0, 0, 0].set(jnp.nan)

    def loss(scales, scale_prior):
        prior = jnp.full((1, 2), 0.5)
        out = multiscale_deformable_aggregate(
            ones, directions, scales, ones, scale_prior, direction_prior=prior, max_scale=1.0
        )
        return jnp.sum(out)

    d_scales, d_scale_prior = jax.grad(loss, (0, 1))(0 * ones, jnp.zeros(1))
    assert np.isfinite(d_scales).all() and d_scales[0, 0, 0] == 0
    assert d_scale_prior[0] == pytest.approx(np.sum(d_scales)) and d_scale_prior[0] != 0


def test_no_maximum_is_asked_of_triton():
    """Its maximum of a NaN and a number is the number, which on CPUs nothing shows."""
    assert " max " not in str(jax.make_jaxpr(points._sigmoid)(1.0))
