"""The deformable aggregation against its definition, the released kernel and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.deformable_conv import deformable_aggregate
from pallas_kernels.deformable_conv.reference import deformable_aggregate_reference
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import check_released, output_and_gradients

pytestmark = pytest.mark.usefixtures("quick_compilation")

BOUNDARIES = ("zeros", "truncate")
BASES = {"zeros": np.floor, "truncate": np.trunc}
NAMES = ("values", "offsets", "weights")

# (B, h, w, G, C, K): square, oblong, not powers of two, one token, one row.
SHAPES = {
    (2, 8, 8, 2, 16, 9): "truncate",
    (1, 5, 13, 3, 7, 9): "zeros",
    (3, 1, 1, 1, 1, 1): "zeros",
    (2, 1, 11, 2, 4, 25): "truncate",
}


SMALL = (2, 5, 4, 2, 3, 4)


def inputs(shape, seed=0, reach=3.0):
    """values, offsets, weights and a cotangent of the output; many samples fall outside."""
    b, h, w, g, c, k = shape
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    offsets = np.float32(reach) * normal(b, h, w, g, k, 2)
    return normal(b, h, w, g, c), offsets, normal(b, h, w, g, k), normal(b, h, w, g, c)


@functools.cache
def with_gradients(boundary, function=deformable_aggregate):
    """Compiled (values, offsets, weights, cotangent) -> (output, *gradients), once a shape."""
    bound = functools.partial(function, boundary=boundary)
    return jax.jit(functools.partial(output_and_gradients, bound))


def expected(boundary, *arrays):
    """The reference's output and gradients in float64."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
        results = with_gradients(boundary, deformable_aggregate_reference)(*arrays)
        assert all(array.dtype == jnp.float64 for array in results)
        return [np.asarray(array) for array in results]


def by_loops(values, offsets, weights, boundary):
    """The definition once more, in numpy and without a vector in sight."""
    b, h, w, g, _ = values.shape
    out = np.zeros(values.shape)
    for n, y, x, group, k in np.ndindex(b, h, w, g, weights.shape[-1]):
        px, py = np.float64(offsets[n, y, x, group, k]) + (x, y)
        x0, y0 = BASES[boundary](px), BASES[boundary](py)
        for i, weight_x in ((x0, 1 - (px - x0)), (x0 + 1, px - x0)):
            for j, weight_y in ((y0, 1 - (py - y0)), (y0 + 1, py - y0)):
                if 0 <= i < w and 0 <= j < h:
                    share = weights[n, y, x, group, k] * weight_x * weight_y
                    out[n, y, x, group] += share * values[n, int(j), int(i), group]
    return out


def assert_close(actual, wanted, tolerance):
    for name, a, b in zip(("out", *NAMES), actual, wanted, strict=True):
        assert relative_error(a, b) < tolerance, name


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_reference_is_the_definition(boundary):
    values, offsets, weights, cotangent = inputs(SMALL)
    out = expected(boundary, values, offsets, weights, cotangent)[0]
    assert relative_error(out, by_loops(values, offsets, weights, boundary)) < 1e-12


@pytest.mark.parametrize("function", [deformable_aggregate, deformable_aggregate_reference])
@pytest.mark.parametrize("case", ["case0", "case1"])
def test_truncate_is_the_released_kernel(fixture_file, function, case):
    check_released(fixture_file("op.npz"), case, with_gradients("truncate", function))


def test_zeros_differs_from_the_released_kernel(fixture_file):
    data = fixture_file("op.npz")
    out = deformable_aggregate(*(data[f"case0/{name}"] for name in NAMES))
    assert relative_error(out, data["case0/out"]) > 0.1


@pytest.mark.parametrize("shape, boundary", SHAPES.items())
def test_matches_the_float64_reference(shape, boundary):
    arrays = inputs(shape)
    actual = with_gradients(boundary)(*arrays)
    assert_close(actual, expected(boundary, *arrays), 1e-5)


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 7, 7, 3, 5, 4))),
    reach=st.sampled_from([0.3, 2.0, 40.0]),
    boundary=st.sampled_from(BOUNDARIES),
    seed=st.integers(0, 99),
)
def test_matches_the_float64_reference_on_random_shapes(shape, reach, boundary, seed):
    arrays = inputs(shape, seed, reach)
    actual = with_gradients(boundary)(*arrays)
    assert_close(actual, expected(boundary, *arrays), 1e-5)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradients_are_finite_differences_away_from_kinks(boundary):
    values, offsets, weights, cotangent = inputs(SMALL)
    whole = np.floor(offsets)
    offsets = whole + np.clip(offsets - whole, 0.1, 0.9)
    arrays = [values, offsets, weights]
    gradients = with_gradients(boundary)(*arrays, cotangent)[1:]
    step = 1e-3  # exact but for rounding: a coordinate enters bilinearly, the others linearly
    rng = np.random.default_rng(1)
    for position, name in enumerate(NAMES):
        for _ in range(12):
            index = tuple(rng.integers(n) for n in arrays[position].shape)
            sides = []
            for sign in (1, -1):
                moved = [np.float64(array) for array in arrays]
                moved[position][index] += sign * step
                sides.append(np.vdot(by_loops(*moved, boundary), np.float64(cotangent)))
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(gradients[position][index]) == pytest.approx(slope, rel=1e-4, abs=1e-5), (
                name
            )


@pytest.mark.parametrize(
    "dtype, points_dtype, boundary",
    [
        ("bfloat16", "float32", "zeros"),
        ("float16", "float16", "truncate"),
    ],
)
def test_half_precision(dtype, points_dtype, boundary):
    dtypes = (dtype, points_dtype, points_dtype, dtype)
    arrays = [
        jnp.asarray(array, dtype)
        for array, dtype in zip(inputs((2, 8, 6, 2, 16, 4)), dtypes, strict=True)
    ]
    actual = with_gradients(boundary)(*arrays)
    assert [a.dtype for a in actual] == [jnp.dtype(d) for d in (dtypes[0], *dtypes[:3])]
    # The reference starts from the rounded inputs, so only the operator's own rounding is seen.
    assert_close(actual, expected(boundary, *(np.asarray(a, np.float32) for a in arrays)), 1e-2)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("function", [deformable_aggregate, deformable_aggregate_reference])
def test_a_point_that_is_not_finite_is_as_if_its_weight_were_zero(function, boundary):
    values, offsets, weights, cotangent = inputs(SMALL)
    rng = np.random.default_rng(2)
    broken = rng.random(offsets.shape) < 0.1
    bad = rng.choice(np.float32([np.nan, np.inf, -np.inf]), offsets.shape)
    lost = broken.any(-1)
    function = with_gradients(boundary, function)
    actual = function(values, np.where(broken, bad, offsets), weights, cotangent)
    wanted = function(values, offsets, np.where(lost, np.float32(0), weights), cotangent)
    for name, a, b in zip(("out", *NAMES), actual, wanted, strict=True):
        b = np.array(b)
        if name in ("offsets", "weights"):
            b[lost] = 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("far", [1e4, -3e9, 3e38])
def test_points_far_outside_sample_nothing(far, boundary):
    values, offsets, weights, cotangent = inputs(SMALL)
    arrays = values, np.full_like(offsets, far), weights, cotangent
    for array in with_gradients(boundary)(*arrays):
        np.testing.assert_array_equal(array, np.zeros(array.shape))


def test_at_no_offset_it_returns_the_values():
    values, offsets, weights, _ = inputs((2, 6, 5, 2, 3, 1))
    out = deformable_aggregate(values, 0 * offsets, np.ones_like(weights))
    np.testing.assert_array_equal(out, values)


def test_offsets_are_dx_then_dy_in_tokens():
    values, offsets, weights, _ = inputs((1, 4, 5, 1, 2, 1))
    offsets[...] = (2, 1)
    out = deformable_aggregate(values, offsets, np.ones_like(weights))
    np.testing.assert_array_equal(out[:, :3, :3], values[:, 1:, 2:])
    np.testing.assert_array_equal(out[:, 3:], 0 * values[:, 3:])
    np.testing.assert_array_equal(out[:, :, 3:], 0 * values[:, :, 3:])


@pytest.mark.parametrize(
    "dtype, shape",
    [
        pytest.param("float32", (8, 16, 16, 6, 64, 9), marks=pytest.mark.slow),
        pytest.param("bfloat16", (16, 8, 8, 4, 32, 9), marks=pytest.mark.slow),
        ("float16", (2, 12, 20, 3, 24, 9)),
    ],
)
def test_temporary_memory_is_at_most_twice_the_values(dtype, shape):
    values, offsets, weights, cotangent = (
        jax.ShapeDtypeStruct(array.shape, dtype if position in (0, 3) else array.dtype)
        for position, array in enumerate(inputs(shape))
    )

    def temporary_bytes(function, *arguments):
        compiled = jax.jit(function).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    limit = 2 * values.size * values.dtype.itemsize
    assert temporary_bytes(deformable_aggregate, values, offsets, weights) <= limit
    both = functools.partial(output_and_gradients, deformable_aggregate)
    assert temporary_bytes(both, values, offsets, weights, cotangent) <= limit


def test_vmap_is_a_loop():
    many = [inputs(SMALL, seed) for seed in range(3)]
    stacked = [jnp.asarray(np.stack(arrays)) for arrays in zip(*many, strict=True)]
    function = with_gradients("zeros")
    mapped = jax.jit(jax.vmap(function))(*stacked)
    for i in range(3):
        single = function(*(array[i] for array in stacked))
        for a, b in zip(mapped, single, strict=True):
            assert relative_error(a[i], b) < 1e-6


def test_remat_changes_no_gradient():
    *arrays, cotangent = inputs(SMALL)

    def loss(*arrays):
        return jnp.vdot(jnp.tanh(deformable_aggregate(*arrays)), cotangent)

    plain = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    again = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*arrays)
    for a, b in zip(again, plain, strict=True):
        assert relative_error(a, b) < 1e-6


def test_gradients_repeat_to_the_last_bit():
    arrays = inputs((2, 8, 8, 2, 16, 9))
    first, second = (with_gradients("truncate")(*arrays) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def mesh():
    if len(jax.devices()) < 8:
        pytest.skip(f"needs 8 devices for a mesh; JAX has {len(jax.devices())}")
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def test_a_sharded_batch_is_not_gathered(mesh):
    arrays = inputs((16, 4, 6, 2, 8, 4))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = [jax.device_put(array, sharding) for array in arrays]
    both = with_gradients("zeros")
    compiled = both.lower(*sharded).compile()
    text = compiled.as_text()
    assert "num_partitions=8" in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
    actual = compiled(*sharded)
    assert all(a.sharding.is_equivalent_to(sharding, a.ndim) for a in actual)
    for a, b in zip(actual, both(*arrays), strict=True):
        assert relative_error(a, b) < 1e-6


def test_works_inside_shard_map(mesh):
    arrays = inputs((16, 4, 6, 2, 8, 4))
    both = with_gradients("zeros")
    spec = PartitionSpec("data")
    mapped = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec))
    for a, b in zip(mapped(*arrays), both(*arrays), strict=True):
        assert relative_error(a, b) < 1e-6


def replaced(**changes):
    arrays = dict(zip(NAMES, inputs((2, 4, 5, 3, 6, 9)), strict=False))
    return arrays | changes


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (dict(boundary="reflect"), ValueError, ["boundary", "'reflect'", "'zeros'", "'truncate'"]),
        (dict(implementation="cuda"), ValueError, ["implementation", "'cuda'", "'xla'"]),
        (dict(values=[1.0]), TypeError, ["values", "list", "array"]),
        (dict(values=np.zeros((4, 5, 3, 6), "f")), ValueError, ["values", "(4, 5, 3, 6)"]),
        (dict(values=np.zeros((2, 0, 5, 3, 6), "f")), ValueError, ["values", "empty"]),
        (dict(weights=np.zeros((2, 5, 4, 3, 9), "f")), ValueError, ["weights", "(2, 5, 4, 3, 9)"]),
        (dict(weights=np.zeros((2, 4, 5, 3, 0), "f")), ValueError, ["weights", "K >= 1"]),
        (dict(weights=np.zeros((2, 4, 5, 3), "f")), ValueError, ["weights", "(2, 4, 5, 3)"]),
        (
            dict(offsets=np.zeros((2, 4, 5, 3, 9), "f")),
            ValueError,
            ["offsets", "(2, 4, 5, 3, 9)", "(2, 4, 5, 3, 9, 2)"],
        ),
        (
            dict(offsets=np.zeros((2, 4, 5, 3, 8, 2), "f")),
            ValueError,
            ["offsets", "(2, 4, 5, 3, 8, 2)", "(2, 4, 5, 3, 9, 2)"],
        ),
        (dict(values=np.zeros((2, 4, 5, 3, 6), int)), TypeError, ["values", "int64", "bfloat16"]),
        (dict(values=np.zeros((2, 4, 5, 3, 6))), TypeError, ["values", "float64", "float32"]),
        (
            dict(offsets=np.zeros((2, 4, 5, 3, 9, 2), np.float16)),
            TypeError,
            ["offsets", "float16", "float32"],
        ),
        (dict(weights=np.zeros((2, 4, 5, 3, 9), int)), TypeError, ["weights", "int64", "float32"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, error, words):
    with pytest.raises(error) as caught:
        deformable_aggregate(**replaced(**changes))
    for word in words:
        assert word in str(caught.value)
