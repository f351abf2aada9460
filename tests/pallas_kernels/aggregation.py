"""What the tests of the deformable aggregation share."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.deformable_conv import pallas
from pallas_kernels.deformable_conv.blocks import Blocks
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES, model_inputs
from pallas_kernels.deformable_conv.points import Multiscale, Offsets
from pallas_kernels.deformable_conv.reference import deformable_aggregate_reference
from tests.comparison import relative_error


def output_and_gradients(function, *arrays):
    """(function(*inputs), its gradients) for arrays = (*inputs, cotangent of the output).

    An input may be a pair or a row of sampling points, which has a gradient for each of its fields
    but for `Multiscale`'s two constants.
    """
    *inputs, cotangent = arrays
    out, vjp = jax.vjp(function, *inputs)
    return out, *jax.tree.leaves(vjp(cotangent))[:5]


def cast(values, points, cotangent, dtype, points_dtype=None):
    """The same in other dtypes; the points' is `dtype` by default."""
    per_query = [jnp.asarray(field, points_dtype or dtype) for field in points.per_query]
    points = type(points)(*per_query, *points.per_group, *points.constant)
    return jnp.asarray(values, dtype), points, jnp.asarray(cotangent, dtype)


def check_released(file, case, function, *, tolerance=1e-5, product_tolerance=1e-5):
    """Holds function(values, offsets, weights, cotangent) -> (output, *gradients) to op.npz.

    The fixture's grad_values is the gradient summed over an unknown number of launches. It is 1821
    times (case0) and 1457 times (case1) too large, with the rounding of as many float32 additions:
    d out . out = d values . values fails by those factors, as it cannot for any gradient of a
    function linear in `values`. So its direction is compared, and its length by that identity.
    """
    golden = {name.removeprefix(f"{case}/"): a for name, a in file.items() if case in name}
    inputs = [golden[name] for name in ("values", "offsets", "weights", "cotangent")]
    out, d_values, d_offsets, d_weights = function(*inputs)
    assert relative_error(out, golden["out"]) < tolerance
    assert relative_error(d_offsets, golden["grad_offsets"]) < tolerance
    assert relative_error(d_weights, golden["grad_weights"]) < tolerance

    unit = lambda a: a / np.linalg.norm(np.asarray(a, np.float64))  # noqa: E731
    assert relative_error(unit(d_values), unit(golden["grad_values"])) < 10 * tolerance
    product = np.vdot(np.float64(golden["cotangent"]), np.float64(golden["out"]))
    inner = np.vdot(np.float64(golden["values"]), np.float64(d_values))
    assert inner == pytest.approx(product, rel=product_tolerance)


def inputs(shape, form, dtype, points_dtype):
    """(values, points, d out): values and d out in `dtype`, `points_dtype` for the points."""
    values, points, d_out = model_inputs(shape)
    if form == "offsets":
        points = points.to_offsets()
    per_query = [jnp.asarray(x, points_dtype) for x in points.per_query]
    points = type(points)(*per_query, *points.per_group, *points.constant)
    return jnp.asarray(values, dtype), points, jnp.asarray(d_out, dtype)


@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def _differentiated(boundary, values, points, d_out):
    def function(values, points):
        if not isinstance(points, Offsets):
            points = points.to_offsets()
        return deformable_aggregate_reference(values, *points, boundary=boundary)

    out, vjp = jax.vjp(function, values, points)
    return out, *vjp(d_out)


def reference(boundary, *arrays):
    """(output, gradient of the values, those of the points), in float64."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        return jax.device_get(_differentiated(boundary, *arrays))


def named_structs(shape, dtype):
    """Shapes and dtypes of the values and points of one of NAMED_SHAPES."""
    b, h, w, g, c, k = NAMED_SHAPES[shape]
    struct = jax.ShapeDtypeStruct
    points = Multiscale(
        struct((b, h, w, g, k, 2), dtype),
        struct((b, h, w, g, k), dtype),
        struct((b, h, w, g, k), dtype),
        struct((g,), jnp.float32),
        struct((k, 2), jnp.float32),
        struct((2,), jnp.float32),
    )
    return struct((b, h, w, g, c), dtype), points


def lowered_for_cuda(function, *args) -> str:
    """The program for NVIDIA GPUs, on any machine."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def lowered_for_an_h100(function, *args) -> str:
    """The same on a machine without one, for Triton too: catches what Pallas cannot express."""
    device = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # older versions take an H100 for granted
        h100 = AbstractDevice("NVIDIA H100", 132, platform="gpu")
        device = jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100))
    with device:
        return lowered_for_cuda(function, *args)


def points_that_are_not_finite(channels: int = 8):
    """(values, points, the same without those that are not finite, d_out).

    Of those that are not, one has a weight that is not finite either.
    """
    values, points, d_out = inputs((1, 4, 8, 1, channels, 3), "offsets", jnp.bfloat16, jnp.float32)
    offsets = np.array(points.offsets)
    bad = offsets.copy()
    bad[0, 0, 0, 0, 1] = np.nan, 0
    bad[0, 1, 2, 0, 0] = np.inf, 1
    bad[0, 3, 7, 0, 2] = -3e38, 3e38
    weights = np.array(points.weights)
    weights[np.any(bad != offsets, axis=-1)] = 0
    without = Offsets(jnp.asarray(offsets), jnp.asarray(weights))
    bad_weights = points.weights.at[0, 0, 0, 0, 1].set(jnp.nan)
    return values, Offsets(jnp.asarray(bad), bad_weights), without, d_out


def replace_in_pallas(monkeypatch, **functions) -> None:
    """Replaces functions of `pallas.py`, and forgets for the test what was traced with others."""
    for name, function in functions.items():
        monkeypatch.setattr(pallas, name, function)
    monkeypatch.setattr(pallas, "_sharded", functools.cache(pallas._sharded.__wrapped__))


def check_released_in_float16(
    arrays: dict, case: str, blocks: Blocks, monkeypatch, *, least_channels: int = 8
) -> None:
    """`check_released` of simulated kernels, with channels filled up to eights."""
    replace_in_pallas(monkeypatch, choose=lambda *_, **__: blocks)

    def run(values, offsets, weights, cotangent):
        def function(values, points):
            return pallas.deformable_aggregate_pallas(values, points, "truncate", True)

        channels = values.shape[-1]
        padding = max(-channels % 8, least_channels - channels)
        pad = [(0, 0)] * 4 + [(0, padding)]
        values, cotangent = (jnp.asarray(np.pad(x, pad), jnp.float16) for x in (values, cotangent))
        # In float16, as some kernels round weights to it.
        points = Offsets(jnp.asarray(offsets), jnp.asarray(weights, jnp.float16))
        out, d_values, *d_points = output_and_gradients(function, values, points, cotangent)
        return out[..., :channels], d_values[..., :channels], *d_points

    check_released(arrays, case, run, tolerance=2e-3, product_tolerance=2e-3)


def mostly_slow(cases: list[tuple], *, quick: tuple[int, ...]) -> list:
    """`cases`, those but for the numbers `quick` marked as slow: to simulate one takes seconds.

    The tests for GPUs take them all.
    """
    slow = pytest.mark.slow
    return [
        case if number in quick else pytest.param(*case, marks=slow)
        for number, case in enumerate(cases)
    ]
