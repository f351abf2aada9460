"""Arrays and weights of any size: which kernels take them, and that plain JAX takes the rest."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.deformable_conv import (
    api,
    blocks,
    deformable_aggregate,
    limits,
    pallas,
    row_gather,
    sparse_transpose,
    xla,
)
from pallas_kernels.deformable_conv.blocks import Blocks, PointLists, RowGather
from pallas_kernels.deformable_conv.points import Multiscale, Offsets
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import (
    inputs,
    lowered_for_an_h100,
    output_and_gradients,
    reference,
    replace_in_pallas,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

CUDA_GRID = {"x": 2**31 - 1, "y": 2**16 - 1, "z": 2**16 - 1}
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(function):
    """(values, points, d out) -> (output, *gradients)."""
    return jax.jit(functools.partial(output_and_gradients, function), compiler_options=QUICKLY)


# --- weights that float16 has not ----------------------------------------------------------------


def by_xla(values, points):
    return xla.deformable_aggregate_xla(values, points, "truncate")


def by_pallas(values, points):
    return pallas.deformable_aggregate_pallas(values, points, "truncate", True, True)


@pytest.mark.parametrize("by", ["xla", "Triton's kernels", "Hopper's kernels"])
def test_float32_weights_of_float16_values_keep_their_size(by, monkeypatch):
    """1e5 is infinite in float16, and 1e-6 is 4 % off."""
    if by == "Hopper's kernels":
        rows = RowGather(num_warps=4)
        sizes = Blocks(rows, rows, PointLists(num_warps=4))
        replace_in_pallas(monkeypatch, choose=lambda *_, **__: sizes)
    run = compiled(by_xla if by == "xla" else by_pallas)
    for size in (1e5, 1e-6):
        values, points, d_out = inputs((1, 6, 7, 2, 8, 3), "offsets", jnp.float16, jnp.float32)
        # So that nothing but a weight is beyond what float16 has.
        values, d_out = (jnp.asarray(x / size**0.5, jnp.float16) for x in (values, d_out))
        points = points._replace(weights=points.weights * size)
        out, d_values, *d_points = run(values, points, d_out)
        expected = reference("truncate", values, points, d_out)
        assert relative_error(out, expected[0]) < 1e-3
        assert relative_error(d_values, expected[1]) < 1e-3
        for a, b in zip(d_points, expected[2], strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("hopper", [False, True], ids=["any", "hopper"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_kernels_that_round_weights_get_none_that_float16_has_not(size, hopper):
    choose = functools.partial(blocks.choose, size, size, 72, 9, hopper=hopper)
    narrow, mixed = choose("float16"), choose("float16", "float32")
    assert isinstance(mixed.forward, (blocks.Gather, blocks.RowGather))
    assert mixed.values_gradient == choose("float32").values_gradient
    assert mixed.point_gradients == narrow.point_gradients  # by products without weights
    assert choose("float16", "float16") == narrow == choose("bfloat16")
    assert choose("bfloat16", "float32") == choose("bfloat16")


# --- arrays that are too large for the kernels ---------------------------------------------------


def structs(shape, dtype, form="multiscale"):
    """(values, points) of shape (B, h, w, G, C, K), which nobody has to hold."""
    *tokens_and_groups, c, k = shape
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    per_point = (*tokens_and_groups, k)
    offsets, scales, weights = array((*per_point, 2)), array(per_point), array(per_point)
    values = array((*tokens_and_groups, c))
    if form == "offsets":
        return values, Offsets(offsets, weights)
    constants = (jax.ShapeDtypeStruct(x, jnp.float32) for x in ((shape[3],), (k, 2), (2,)))
    return values, Multiscale(offsets, scales, weights, *constants)


def programs(monkeypatch, shape, dtype="bfloat16", *, hopper, form="multiscale", or_xla=True):
    """The forward and the backward for an H100, as it is or as another GPU."""
    replace_in_pallas(monkeypatch, is_hopper=lambda: hopper)
    values, points = structs(shape, dtype, form)

    def forward(values, points):
        return pallas.deformable_aggregate_pallas(values, points, "zeros", False, or_xla)

    def backward(values, points, d_out):
        return jax.vjp(forward, values, points)[1](d_out)

    return (
        lowered_for_an_h100(forward, values, points),
        lowered_for_an_h100(backward, values, points, values),
    )


def kernels_in(program: str) -> int:
    return len(re.findall(r"custom_call @(mosaic_gpu|__gpu\$xla\.gpu\.triton)", program))


TOO_LARGE = {
    "values": ((8000, 16, 16, 16, 72, 9), "multiscale"),
    "offsets": ((2000, 32, 32, 16, 8, 36), "offsets"),
    "directions": ((8000, 16, 16, 16, 8, 36), "multiscale"),
    "one image": ((1, 4096, 4096, 2, 72, 1), "offsets"),
}


@pytest.mark.parametrize("hopper", [False, True], ids=["any", "hopper"])
@pytest.mark.parametrize("shape, form", TOO_LARGE.values(), ids=TOO_LARGE)
def test_more_elements_than_indices_are_left_to_plain_jax(shape, form, hopper, monkeypatch):
    for program in programs(monkeypatch, shape, form=form, hopper=hopper):
        assert kernels_in(program) == 0
    with pytest.raises(ValueError, match="'pallas'.* elements; expected at most 2147483647"):
        programs(monkeypatch, shape, form=form, hopper=hopper, or_xla=False)


def test_so_is_a_backward_that_would_need_such_an_array(monkeypatch):
    """Which tiles are connected: 4096 times 4096 of 128 images."""
    shape = (128, 512, 512, 1, 8, 1)
    forward, backward = programs(monkeypatch, shape, "float32", form="offsets", hopper=False)
    assert kernels_in(forward) == 1 and kernels_in(backward) == 0
    smaller = (127, *shape[1:])
    _, backward = programs(monkeypatch, smaller, "float32", form="offsets", hopper=False)
    assert kernels_in(backward) == 3


@pytest.mark.parametrize("shape", [(70_000, 2, 3, 1, 8, 2), (2, 2, 3, 70_000, 8, 2)])
def test_batches_and_groups_beyond_cudas_grid(shape, monkeypatch):
    """Of blocks in one dimension, or in those that Pallas makes of them."""
    for program in programs(monkeypatch, shape, hopper=False):
        grids = re.findall(r"grid_([xyz]) = (\d+)", program)
        assert len(grids) == 3 * kernels_in(program) > 0
        assert all(int(size) <= CUDA_GRID[axis] for axis, size in grids)
    for program in programs(monkeypatch, shape, hopper=True):
        assert "@mosaic_gpu" in program and "triton" not in program


@pytest.mark.parametrize("form", ["offsets", "multiscale"])
def test_plain_jax_in_the_place_of_kernels_gives_what_it_gives(form, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ELEMENTS", 100)
    replace_in_pallas(monkeypatch)
    arrays = inputs((2, 3, 4, 2, 8, 2), form, jnp.bfloat16, jnp.bfloat16)
    actual, expected = (compiled(function)(*arrays) for function in (by_pallas, by_xla))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < (1e-2 if a.ndim == 1 else 1e-6)  # a sum of rounded gradients


def test_what_counts_is_the_part_that_a_device_has(monkeypatch):
    """A sharded batch may be as large as all devices together take."""
    values, points, _ = inputs((16, 3, 4, 1, 8, 2), "offsets", jnp.bfloat16, jnp.bfloat16)
    monkeypatch.setattr(limits, "MAX_ELEMENTS", values.size // 8)
    replace_in_pallas(monkeypatch)
    left_to_xla = []

    def record(values, points, boundary):
        left_to_xla.append(values.shape[0])
        return xla.deformable_aggregate_xla(values, points, boundary)

    monkeypatch.setattr(pallas, "deformable_aggregate_xla", record)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put((values, points), NamedSharding(mesh, PartitionSpec("data")))
    out = jax.jit(by_pallas, compiler_options=QUICKLY)(*sharded)
    assert set(left_to_xla) == {16}  # as it is traced, before it is split
    assert relative_error(out, by_xla(values, points)) < 1e-2


@pytest.mark.parametrize("implementation, or_xla", [(None, True), ("pallas", False)])
def test_what_is_too_large_for_kernels_asked_for_is_an_error(implementation, or_xla, monkeypatch):
    calls = []

    def record(values, points, *options):
        calls.append(options)
        return values

    monkeypatch.setattr(api, "why_not_pallas", lambda: None)
    monkeypatch.setattr(pallas, "deformable_aggregate_pallas", record)
    values, points, _ = inputs((1, 2, 2, 1, 8, 1), "offsets", jnp.float32, jnp.float32)
    deformable_aggregate(values, *points, implementation=implementation)
    assert calls == [("zeros", False, or_xla)]


def test_an_image_of_more_tokens_than_float32_counts():
    """The last of 4097 x 4097, in plain JAX."""
    size = 4097
    last = jnp.full((1, 1, 1), size - 1.0)
    # Private: an image of that size would take gigabytes, its corners take none.
    corner = next(xla._corners(last, last - 1, size, size, "zeros"))
    assert int(corner.token[0, 0, 0]) == (size - 1) * size - 1


def test_images_too_large_for_some_kernels():
    assert "46341 x 5793" in row_gather.why_not(46341, 5793, 8, 1)
    assert row_gather.why_not(8192, 8191, 8, 1) is None
    assert sparse_transpose.NOWHERE > limits.MAX_ELEMENTS // 8  # of which all tokens have channels


@pytest.mark.parametrize("h, w", [(2**24 + 1, 1), (1, 2**24 + 1), (2**16, 2**15)])
def test_images_whose_tokens_cannot_be_counted_are_refused(h, w):
    values, points = structs((1, h, w, 1, 1, 1), jnp.float32, "offsets")
    with pytest.raises(ValueError, match=rf"\(1, {h}, {w}, 1, 1\).*16777216.*2147483647 tokens"):
        jax.eval_shape(deformable_aggregate, values, *points)
