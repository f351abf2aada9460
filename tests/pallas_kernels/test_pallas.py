"""The Pallas kernels: interpreted on a CPU against the definition, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.deformable_conv import (
    blocks,
    deformable_aggregate,
    multiscale_deformable_aggregate,
)
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES, model_inputs
from pallas_kernels.deformable_conv.pallas import deformable_aggregate_pallas
from pallas_kernels.deformable_conv.points import Offsets
from pallas_kernels.deformable_conv.reference import deformable_aggregate_reference
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import (
    cast,
    check_released,
    lowered_for_an_h100,
    mostly_slow,
    output_and_gradients,
    replace_in_pallas,
)

SMALL = (2, 5, 4, 2, 3, 4)


@functools.cache
def interpreted(boundary):
    def function(values, points):
        return deformable_aggregate_pallas(values, points, boundary, True)

    # An interpreted kernel is a large program that runs for a moment.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(functools.partial(output_and_gradients, function), compiler_options=options)


@functools.cache
def reference(boundary):
    def function(values, points):
        if not isinstance(points, Offsets):
            points = points.to_offsets()
        return deformable_aggregate_reference(values, *points, boundary=boundary)

    def in_float64(*arrays):
        with jax.enable_x64(True):
            arrays = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), arrays)
            return jax.device_get(compiled(*arrays))

    compiled = jax.jit(functools.partial(output_and_gradients, function))
    return in_float64


def check(shape, form, boundary, dtype, points_dtype, tolerance):
    arrays = model_inputs(shape, seed=1)  # with 0, all points of the one token lie outside
    if form == "offsets":
        arrays = (arrays[0], arrays[1].to_offsets(), arrays[2])
    arrays = cast(*arrays, dtype, points_dtype)
    actual = interpreted(boundary)(*arrays)
    expected = reference(boundary)(*arrays)
    inputs = (arrays[0], arrays[0], *arrays[1])
    for a, b, like in zip(actual, expected, inputs, strict=False):
        assert a.dtype == like.dtype and a.shape == b.shape
        is_sum = a.ndim == 1  # the scale prior's gradient: much of it cancels
        assert relative_error(a, b) < tolerance * (10 if is_sum else 1)


@pytest.mark.parametrize(
    "shape, form, boundary",
    mostly_slow(
        [
            ((2, 5, 7, 2, 12, 9), "multiscale", "truncate"),  # one tile, hanging over the border
            ((1, 16, 16, 2, 8, 9), "multiscale", "zeros"),  # several tiles a program
            ((1, 9, 40, 1, 8, 4), "multiscale", "truncate"),  # tiles that nothing connects
            ((1, 24, 17, 2, 5, 9), "offsets", "zeros"),
            ((3, 1, 1, 1, 1, 1), "offsets", "truncate"),
            ((1, 3, 9, 1, 136, 2), "offsets", "truncate"),  # channels in two parts
            ((1, 2, 3, 1, 4, 25), "multiscale", "zeros"),
        ],
        quick=(0, 4),
    ),
)
def test_float32_matches_the_definition(shape, form, boundary):
    check(shape, form, boundary, jnp.float32, jnp.float32, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_matches_the_definition(dtype):
    check((1, 8, 12, 2, 24, 9), "multiscale", "zeros", dtype, dtype, 1e-2)
    check((1, 8, 12, 2, 24, 9), "offsets", "truncate", dtype, jnp.float32, 1e-2)


# Not shrunk: an example takes seconds to compile.
@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=st.tuples(
        st.integers(1, 2),
        st.integers(1, 20),
        st.integers(1, 20),
        st.integers(1, 2),
        st.integers(1, 20),
        st.integers(1, 9),
    ),
    boundary=st.sampled_from(["zeros", "truncate"]),
)
def test_float32_matches_the_definition_on_random_shapes(shape, boundary):
    check(shape, "multiscale", boundary, jnp.float32, jnp.float32, 5e-6)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_truncate_is_the_released_kernel(fixture_file, case):
    def function(values, offsets, weights, cotangent):
        return interpreted("truncate")(values, Offsets(offsets, weights), cotangent)

    check_released(fixture_file("op.npz"), case, function)


@pytest.mark.slow  # test_not_finite has a smaller one
def test_points_that_are_not_finite_add_nothing():
    values, points, cotangent = model_inputs((1, 6, 9, 2, 4, 4))
    offsets, weights = (np.array(x) for x in points.to_offsets())
    bad = np.random.default_rng(0).random(weights.shape) < 0.3
    odd = np.random.default_rng(1).choice([np.nan, np.inf, -np.inf], (*weights.shape, 2))
    points = Offsets(np.where(bad[..., None], odd, offsets).astype(np.float32), weights)
    actual = interpreted("truncate")(values, points, cotangent)
    points = Offsets(np.where(bad[..., None], 0, offsets), np.where(bad, 0, weights))
    expected = reference("truncate")(values, points, cotangent)
    for a, b in zip(actual[:2], expected[:2], strict=True):
        assert relative_error(a, b) < 5e-6
    for a, b in zip(actual[2:], expected[2:], strict=True):
        assert not np.asarray(a)[bad].any()
        assert relative_error(np.asarray(a)[~bad], np.asarray(b)[~bad]) < 5e-6


@pytest.mark.slow
def test_far_offsets_are_never_connected():
    values, points, cotangent = model_inputs((1, 20, 20, 1, 4, 4))
    offsets, weights = points.to_offsets()
    far = np.asarray(offsets) + np.array([1e9, -3e38], np.float32)
    for array in interpreted("zeros")(values, Offsets(far, weights), cotangent):
        assert not np.asarray(array).any()


@pytest.mark.slow
def test_vmap_is_a_loop():
    many = [model_inputs(SMALL, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *many)
    function = interpreted("zeros")
    # With a scale prior for each, and with one for all.
    for axes in (0, (0, type(many[0][1])(0, 0, 0, None, None, None), 0)):
        arrays = stacked
        if axes != 0:
            shared = many[0][1][3:]
            arrays = (stacked[0], type(stacked[1])(*stacked[1][:3], *shared), stacked[2])
        mapped = jax.vmap(function, in_axes=axes)(*arrays)
        for i in range(3):
            points = many[i][1] if axes == 0 else type(many[i][1])(*many[i][1][:3], *shared)
            single = function(many[i][0], points, many[i][2])
            for a, b in zip(mapped, single, strict=True):
                assert relative_error(a[i], b) < 1e-6


def test_a_sharded_batch_is_not_gathered():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values, points, cotangent = model_inputs((16, 4, 6, 2, 8, 4))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())
    per_query = jax.device_put(points.per_query, rows)
    rest = jax.device_put((*points.per_group, *points.constant), whole)
    arrays = (
        jax.device_put(values, rows),
        type(points)(*per_query, *rest),
        jax.device_put(cotangent, rows),
    )
    compiled = interpreted("zeros").lower(*arrays).compile()
    text = compiled.as_text()
    assert "num_partitions=8" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    assert text.count(" all-reduce(") == 1  # of the scale prior's gradient, [G]
    actual = compiled(*arrays)
    for a in actual[:5]:
        assert a.sharding.is_equivalent_to(rows, a.ndim)
    for a, b in zip(actual, interpreted("zeros")(values, points, cotangent), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("hopper", [False, True], ids=["any", "hopper"])
@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", *(pytest.param(x, marks=pytest.mark.slow) for x in ("float32", "float16"))],
)
@pytest.mark.parametrize("shape", NAMED_SHAPES.values(), ids=NAMED_SHAPES)
def test_every_named_shape_lowers_for_cuda(shape, dtype, hopper, monkeypatch):
    replace_in_pallas(monkeypatch, is_hopper=lambda: hopper)
    small = model_inputs((1, 1, 1, *shape[3:]))
    values, points, cotangent = cast(*small, dtype)

    def full(array, batched=True):
        return jax.ShapeDtypeStruct(
            (*shape[:3], *array.shape[3:]) if batched else array.shape, array.dtype
        )

    points = type(points)(*map(full, points.per_query), *(full(x, False) for x in points[3:]))

    def function(values, points):
        return deformable_aggregate_pallas(values, points, "zeros")

    both = functools.partial(output_and_gradients, function)
    text = lowered_for_an_h100(both, full(values), points, full(cotangent))
    chosen = blocks.choose(*shape[1:3], *shape[4:], dtype, hopper=hopper)
    hopper_kernels = (
        blocks.PointLists,
        blocks.RowGather,
        blocks.RowProducts,
        blocks.RowSlices,
        blocks.SparseMatrix,
    )
    mosaic = sum(isinstance(x, hopper_kernels) for x in chosen)
    assert (mosaic > 0) == hopper
    # Points are sorted, or evaluated, in a kernel of its own.
    first = sum(isinstance(x, (blocks.PointLists, blocks.RowSlices)) for x in chosen)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == mosaic + first
    skips = getattr(chosen.values_gradient, "skip", False)  # in a kernel of its own
    triton = 3 - mosaic + skips
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == triton


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_second_derivatives_are_refused(implementation):
    values, points, _ = model_inputs(SMALL)

    def loss(values):
        if implementation == "xla":
            out = deformable_aggregate(values, *points.to_offsets(), implementation="xla")
        else:
            out = deformable_aggregate_pallas(values, points, "zeros", True)
        return jnp.sum(out**2)

    with pytest.raises(NotImplementedError, match="no second derivatives"):
        jax.grad(lambda values: jnp.sum(jax.grad(loss)(values) ** 2))(values)


def test_pallas_where_it_cannot_run_says_why():
    values, points, _ = model_inputs(SMALL)
    with pytest.raises(ValueError, match="'pallas'.*needs an NVIDIA GPU.*'xla'"):
        deformable_aggregate(values, *points.to_offsets(), implementation="pallas")


# --- the fused form ----------------------------------------------------------------------------


def fused(values, points, boundary="zeros", **changes):
    options = dict(direction_prior=points.direction_prior, max_scale=points.max_scale) | changes
    return multiscale_deformable_aggregate(values, *points[:4], boundary=boundary, **options)


@pytest.mark.parametrize("max_scale", [6.0, np.array([4.0, 7.5], np.float32)])
def test_the_fused_form_builds_the_offsets_first(max_scale):
    values, points, cotangent = model_inputs(SMALL)
    points = points._replace(max_scale=np.broadcast_to(np.float32(max_scale), (2,)))

    def by_offsets(values, points):
        radius = jax.nn.sigmoid(points.scales + points.scale_prior[:, None])[..., None]
        offsets = (points.directions + points.direction_prior) * radius * points.max_scale
        return deformable_aggregate(values, offsets, points.weights)

    def by_scales(values, points):
        return fused(values, points, max_scale=jnp.asarray(max_scale))

    expected = output_and_gradients(by_offsets, values, points, cotangent)
    for actual in (
        output_and_gradients(by_scales, values, points, cotangent),
        interpreted("zeros")(values, points, cotangent),
    ):
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 5e-6


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (dict(scales=np.zeros((2, 5, 4, 2, 3), "f")), ValueError, ["scales", "(2, 5, 4, 2, 3)"]),
        (
            dict(directions=np.zeros(SMALL[:4], "f")),
            ValueError,
            ["directions", "(2, 5, 4, 2, 4, 2)"],
        ),
        (dict(scale_prior=np.zeros(3, "f")), ValueError, ["scale_prior", "(3,)", "(2,)"]),
        (dict(scale_prior=np.zeros(2, int)), TypeError, ["scale_prior", "int", "float32"]),
        (dict(direction_prior=np.zeros((9, 2), "f")), ValueError, ["direction_prior", "(4, 2)"]),
        (dict(max_scale=np.zeros(3, "f")), ValueError, ["max_scale", "(3,)", "(2,)"]),
    ],
)
def test_what_does_not_fit_the_fused_form_is_refused_by_name(changes, error, words):
    values, points, _ = model_inputs(SMALL)
    with pytest.raises(error) as caught:
        fused(values, points._replace(**changes))
    for word in words:
        assert word in str(caught.value)
