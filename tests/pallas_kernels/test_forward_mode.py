"""The operator's derivative along a direction, and gradients of what holds one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.deformable_conv import deformable_aggregate, multiscale_deformable_aggregate
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES, model_inputs
from pallas_kernels.deformable_conv.pallas import deformable_aggregate_pallas
from pallas_kernels.deformable_conv.points import Multiscale
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import (
    lowered_for_an_h100,
    mostly_slow,
    named_structs,
    replace_in_pallas,
)
from tests.pallas_kernels.moving import QUICK, along, case, exactly, operator

SMALL = (2, 5, 4, 2, 3, 4)
IMPLEMENTATIONS = ("xla", "pallas")
REFUSED = "no second derivatives.*stop_gradient"


def check(implementation, shape, form, boundary, tolerance=5e-6, **options):
    primals, tangents, _ = case(shape, form, **options)
    actual = along(implementation, boundary)(primals, tangents)
    assert actual.dtype == primals[0].dtype
    assert relative_error(actual, exactly(boundary, primals, tangents)) < tolerance


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape, form, boundary",
    mostly_slow(
        [
            (SMALL, "multiscale", "truncate"),
            ((1, 9, 20, 1, 12, 3), "offsets", "zeros"),
            ((1, 1, 7, 2, 4, 2), "offsets", "truncate"),
            ((1, 3, 9, 1, 136, 2), "multiscale", "zeros"),  # channels in two parts
        ],
        quick=(0,),
    ),
)
def test_matches_the_definition(implementation, shape, form, boundary):
    check(implementation, shape, form, boundary)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 12, 12, 2, 20, 9))),
    form=st.sampled_from(["multiscale", "offsets"]),
    boundary=st.sampled_from(["zeros", "truncate"]),
)
def test_matches_the_definition_on_random_shapes(implementation, shape, form, boundary):
    check(implementation, shape, form, boundary)


@pytest.mark.parametrize(
    "implementation, dtype, points_dtype",
    [
        ("xla", "bfloat16", "bfloat16"),
        ("pallas", "float16", "float32"),
        pytest.param("pallas", "bfloat16", "bfloat16", marks=pytest.mark.slow),
        pytest.param("xla", "float16", "float32", marks=pytest.mark.slow),
    ],
)
def test_half_precision(implementation, dtype, points_dtype):
    options = dict(dtype=dtype, points_dtype=points_dtype)
    check(implementation, SMALL, "multiscale", "zeros", tolerance=1e-2, **options)


@pytest.mark.parametrize("boundary", ["truncate", pytest.param("zeros", marks=pytest.mark.slow)])
def test_is_a_finite_difference_away_from_kinks(boundary):
    (values, points), tangents, _ = case(SMALL, "offsets")
    offsets = np.asarray(points.offsets)
    whole = np.floor(offsets)
    points = points._replace(offsets=jnp.asarray(whole + np.clip(offsets - whole, 0.1, 0.9)))
    actual = along("xla", boundary)((values, points), tangents)
    step = 1e-4
    with jax.enable_x64(True):
        primals, tangents = (
            jax.tree.map(lambda x: np.asarray(x, np.float64), x)
            for x in ((values, points), tangents)
        )
        sides = [
            operator("reference", boundary)(
                *jax.tree.map(lambda x, d, s=sign: jnp.asarray(x + s * step * d), primals, tangents)
            )
            for sign in (1, -1)
        ]
        difference = (sides[0] - sides[1]) / (2 * step)
    assert relative_error(actual, difference) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_is_the_transpose(implementation):
    """<J u, w> = <u, transposed J w>, of what jax.linearize and jax.vjp give."""
    primals, tangents, cotangent = case(SMALL)
    function = operator(implementation, "zeros")

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(primals, tangents, cotangent):
        linear = jax.linearize(function, *primals)[1](*tangents)
        back = jax.vjp(function, *primals)[1](cotangent)
        return linear, back

    linear, back = both(primals, tangents, cotangent)
    dot = lambda x, y: sum(  # noqa: E731
        np.vdot(np.float64(a), np.float64(b))
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )
    size = np.sqrt(dot(linear, linear) * dot(cotangent, cotangent))
    assert abs(dot(linear, cotangent) - dot(tangents, back)) < 1e-5 * size


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("boundary", ["zeros", "truncate"])
def test_points_that_are_not_finite_add_nothing(implementation, boundary):
    (values, points), (d_values, d_points), _ = case(SMALL)
    rng = np.random.default_rng(0)
    odd = rng.choice(np.float32([np.nan, np.inf, -np.inf]), points.directions.shape)
    lost = rng.random(points.weights.shape) < 0.2
    bad = points._replace(
        directions=jnp.where(lost[..., None], odd, points.directions),
        weights=jnp.where(lost, jnp.nan, points.weights),
    )
    bad_tangents = d_points._replace(
        scales=jnp.where(lost, jnp.inf, d_points.scales),
        weights=jnp.where(lost, jnp.nan, d_points.weights),
    )
    without = points._replace(weights=jnp.where(lost, 0, points.weights))
    still = d_points._replace(weights=jnp.where(lost, 0, d_points.weights))
    run = along(implementation, boundary)
    actual = run((values, bad), (d_values, bad_tangents))
    expected = run((values, without), (d_values, still))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "implementation, prior",
    mostly_slow([("xla", 0), ("xla", None), ("pallas", 0), ("pallas", None)], quick=(0,)),
)
def test_mapped_axes(implementation, prior):
    """With a scale prior for each, or with one for all."""
    arrays = case((1, 3, 4, 2, 3, 2))[:2]
    function = operator(implementation, "zeros")

    def tangent_and_gradient(primals, tangents):
        linear, transposed = jax.vjp(lambda x: jax.jvp(function, primals, x)[1], tangents)
        return linear, transposed(linear)[0][0]

    axes = Multiscale(0, 0, 0, prior, None, None)
    axes = (0, axes), (0, axes)
    moved = [
        jax.tree.map(lambda a, x, f=f: x if a is None else f * x, axes, arrays, is_leaf=is_none)
        for f in (1, 2)
    ]
    stacked = jax.tree.map(
        lambda a, x, y: x if a is None else jnp.stack([x, y]), axes, *moved, is_leaf=is_none
    )
    mapped = jax.vmap(tangent_and_gradient, in_axes=axes)
    mapped = jax.jit(mapped, compiler_options=QUICK)(*stacked)
    alone = jax.jit(tangent_and_gradient, compiler_options=QUICK)
    for n, inputs in enumerate(moved):
        for a, b in zip(mapped, alone(*inputs), strict=True):
            assert relative_error(a[n], b) < 1e-6


def is_none(x):
    return x is None


# --- a loss that holds a derivative --------------------------------------------------------------


def loss(function, wrap, params, data, noise, t, stop=jax.lax.stop_gradient):
    """Of a network of two layers, scanned over; the target holds its derivative along the path."""
    draws = model_inputs((*data.shape, 3), seed=3)[1]

    def layer(x, t, params):
        to_directions, to_scales, to_weights, scale_prior = params
        turn = jnp.tanh(jnp.einsum("bhwgc,ckt->bhwgkt", x, to_directions))
        points = draws._replace(
            directions=turn * t[..., None],
            scales=jnp.einsum("bhwgc,ck->bhwgk", x, to_scales),
            weights=jnp.einsum("bhwgc,ck->bhwgk", x, to_weights),
            scale_prior=scale_prior,
        )
        return x + 0.1 * function(x, points)

    def network(x, t):
        step = lambda x, params: (wrap(layer)(x, t, params), None)  # noqa: E731
        return jax.lax.scan(step, x, params)[0]

    velocity = data - noise
    u, tangent = jax.jvp(network, (t * data + (1 - t) * noise, t), (velocity, jnp.ones_like(t)))
    return jnp.mean((u - stop(velocity + 0.3 * tangent)) ** 2)


def loss_arguments(batch=8):
    normal = lambda n, *shape: 0.3 * jax.random.normal(jax.random.key(n), shape)  # noqa: E731
    params = normal(0, 2, 4, 3, 2), normal(1, 2, 4, 3), normal(2, 2, 4, 3), normal(3, 2, 2)
    shape = batch, 3, 4, 2, 4
    t = jnp.linspace(0.1, 0.9, batch).reshape(-1, 1, 1, 1, 1)
    return params, normal(4, *shape), normal(5, *shape), t


@functools.cache
def loss_gradients(implementation, wrap):
    function = functools.partial(loss, operator(implementation, "zeros"), wrap)
    return jax.jit(jax.value_and_grad(function), compiler_options=QUICK)


def assert_same(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < tolerance


@pytest.mark.slow  # tests/models has a whole network's, of plain JAX
def test_gradient_of_a_loss_that_holds_a_tangent():
    """Of a scan over layers with checkpoints."""
    plain, kernels = (loss_gradients(x, jax.checkpoint)(*loss_arguments()) for x in IMPLEMENTATIONS)
    assert_same(plain, kernels, 5e-6)


@pytest.mark.slow
def test_gradient_of_such_a_loss_without_checkpoints_and_without_jit():
    arguments = loss_arguments()
    expected = loss_gradients("reference", jax.checkpoint)(*arguments)
    assert_same(loss_gradients("xla", lambda f: f)(*arguments), expected, 5e-6)
    function = functools.partial(loss, operator("xla", "zeros"), lambda f: f)
    assert_same(jax.value_and_grad(function)(*arguments), expected, 5e-6)


def over_devices(arrays):
    """With their batch split over eight devices."""
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows, whole = (NamedSharding(mesh, PartitionSpec(x)) for x in (("data", "fsdp"), None))
    return jax.tree.map(lambda x: jax.device_put(x, rows if len(x) == 8 else whole), arrays)


def run_sharded(function, *arrays):
    """function(*arrays), in which no device gets what another one has."""
    compiled = function.lower(*arrays).compile()
    text = compiled.as_text()
    assert "num_partitions=8" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    return compiled(*arrays)


def test_a_sharded_batch_is_not_gathered():
    """By the kernels; tests/models has plain JAX."""
    primals, tangents, _ = case((8, 3, 4, 2, 3, 2))
    function = along("pallas", "zeros")
    actual = run_sharded(function, *over_devices((primals, tangents)))
    assert_same(actual, function(primals, tangents), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sharded_batch_of_such_a_loss_is_not_gathered(implementation):
    arrays, function = loss_arguments(), loss_gradients(implementation, jax.checkpoint)
    assert_same(run_sharded(function, *over_devices(arrays)), function(*arrays), 1e-5)


@pytest.mark.slow
def test_works_inside_shard_map():
    """Gradients of what all devices share, the scale prior, are summed over them."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    primals, tangents, cotangent = case((2, 3, 4, 2, 3, 2))
    function = operator("xla", "zeros")

    def both(primals, tangents, cotangent):
        back = jax.grad(lambda *primals: jnp.vdot(function(*primals), cotangent), (0, 1))
        return jax.jvp(function, primals, tangents), back(*primals)

    rows, shared = PartitionSpec("data"), PartitionSpec()
    specs = rows, Multiscale(rows, rows, rows, shared, shared, shared)
    mapped = jax.shard_map(both, mesh=mesh, in_specs=(specs, specs, rows), out_specs=(rows, specs))
    assert_same(
        jax.jit(mapped)(primals, tangents, cotangent), both(primals, tangents, cotangent), 1e-6
    )


# --- what is in a program ------------------------------------------------------------------------


def test_the_gradient_alone_holds_nothing_of_a_tangent(monkeypatch):
    """And a program for GPUs holds each kernel once, whether for a gradient or a tangent."""
    replace_in_pallas(monkeypatch, is_hopper=lambda: True)
    values, points = named_structs("XL at 256", "bfloat16")
    function = lambda values, points: deformable_aggregate_pallas(values, points, "zeros")  # noqa: E731

    def gradient(values, points):
        return jax.grad(lambda *args: jnp.sum(function(*args)), (0, 1))(values, points)

    def tangent(values, points):
        return jax.jvp(function, (values, points), (values, points))

    text = lowered_for_an_h100(gradient, values, points)
    assert "deformable_tangent" not in text
    assert text.count("custom_call @mosaic_gpu") == 2  # the output is not wanted
    assert "deformable_tangent" in lowered_for_an_h100(tangent, values, points)
    for implementation in IMPLEMENTATIONS:
        primals, _, cotangent = case((1, 2, 2, 1, 1, 1))
        back = lambda *args: jax.vjp(operator(implementation, "zeros"), *args)[1](cotangent)  # noqa: B023, E731
        assert "tangent" not in jax.jit(back).lower(*primals).as_text()


@pytest.mark.parametrize(
    "dtype, hopper",
    [
        ("bfloat16", True),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
        ("float32", True),
    ],
)
@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_every_named_shape_lowers_for_cuda(name, dtype, hopper, monkeypatch):
    replace_in_pallas(monkeypatch, is_hopper=lambda: hopper)
    values, points = named_structs(name, dtype)

    def tangent(values, points):
        function = lambda *args: deformable_aggregate_pallas(*args, "zeros")  # noqa: E731
        return jax.jvp(function, (values, points), (values, points))[1]

    text = lowered_for_an_h100(tangent, values, points)
    assert "deformable_tangent" in text


@pytest.mark.parametrize("implementation", ["xla", pytest.param("pallas", marks=pytest.mark.slow)])
def test_second_derivatives_are_refused(implementation):
    (values, points), (d_values, d_points), _ = case(SMALL)
    function = operator(implementation, "zeros")

    def tangent(points):
        return jax.jvp(function, (values, points), (d_values, d_points))[1]

    for wrong in (
        lambda: jax.jit(jax.grad(lambda points: jnp.sum(tangent(points))))(points),
        lambda: jax.jit(lambda points: jax.jvp(tangent, (points,), (d_points,)))(points),
    ):
        with pytest.raises(NotImplementedError, match=REFUSED):
            wrong()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_loss_whose_gradient_does_not_stop_is_refused(implementation):
    function = functools.partial(loss, operator(implementation, "zeros"), jax.checkpoint)
    gradient = jax.grad(functools.partial(function, stop=lambda x: x))
    with pytest.raises(NotImplementedError, match=REFUSED):
        jax.jit(gradient)(*loss_arguments())


def test_what_kernels_cannot_index_is_plain_jax(monkeypatch):
    replace_in_pallas(monkeypatch, why_not_forward=lambda *_: "they are large")
    primals, tangents, _ = case(SMALL)

    def tangent(or_xla):
        function = lambda *args: deformable_aggregate_pallas(*args, "truncate", True, or_xla)  # noqa: E731
        run = lambda *arrays: jax.jvp(function, *arrays)[1]  # noqa: E731
        return jax.jit(run, compiler_options=QUICK)(primals, tangents)

    assert relative_error(tangent(True), along("xla", "truncate")(primals, tangents)) < 1e-6
    with pytest.raises(ValueError, match="they are large"):
        tangent(False)


def test_the_way_in():
    """All inputs of both public functions move."""
    (values, points), (d_values, d_points), _ = case(SMALL)

    def tangent(function, primals, tangents):
        run = lambda *arrays: jax.jvp(function, *arrays)[1]  # noqa: E731
        return jax.jit(run, compiler_options=QUICK)(primals, tangents)

    options = dict(direction_prior=points.direction_prior, max_scale=points.max_scale)
    function = functools.partial(multiscale_deformable_aggregate, **options, boundary="truncate")
    found = tangent(function, (values, *points[:4]), (d_values, *d_points[:4]))
    expected = along("xla", "truncate")((values, points), (d_values, d_points))
    assert relative_error(found, expected) < 1e-6
    offsets, d_offsets = jax.jvp(lambda x: x.to_offsets(), (points,), (d_points,))
    function = functools.partial(deformable_aggregate, boundary="truncate")
    found = tangent(function, (values, *offsets), (d_values, *d_offsets))
    assert relative_error(found, expected) < 1e-6
