"""What the kernels ask of their backend: here Pallas' Triton. Another backend is another such file.

A kernel works on one tile of one group of one image. Its references are to that image and group:
values [tokens, C], offsets [tokens, K, 2] and so on.
"""

import itertools
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax._src.lib.triton import dialect as triton_dialect
from jax._src.pallas.triton import lowering as triton_lowering
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.extend.core import Primitive

from pallas_kernels.deformable_conv.limits import check_indexable
from pallas_kernels.deformable_conv.points import Points, PointsTangent

MIN_DOT = 16  # the smallest side that a matrix product may have

_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)

load, store, dot = plgpu.load, plgpu.store, plgpu.dot


def launch(
    kernel,
    *,
    name: str,
    tiles: int,
    points: Points,
    inputs: tuple[jax.Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    num_warps: int,
    interpret: bool,
    tangent: PointsTangent | None = None,
) -> list[jax.Array]:
    """Runs kernel(points, *inputs, *outputs) on every tile of every group of every image.

    `points` has its tokens flattened, [B, tokens, G, ...]; `inputs` and `outputs` are so too, and
    reach the kernel as references of [tokens, ...]. points.per_group reach it as references of one
    number, points.constant whole. `tile_number()` tells the kernel which of the tiles it is to do.
    A `tangent` of the points comes to the kernel right after these.

    Raises:
      ValueError: an array has more elements than the kernels' indices reach.
    """
    all_points = [points] if tangent is None else [points, tangent]
    per_token = (*itertools.chain(*(p.per_query for p in all_points)), *inputs)
    check_indexable(name, (*per_token, *outputs))

    def per_token_spec(array):
        rest = array.shape[3:]
        zeros = (0,) * len(rest)
        return pl.BlockSpec(
            (None, array.shape[1], None, *rest), lambda tile, g, b: (b, 0, g, *zeros)
        )

    def constant_spec(array):
        return pl.BlockSpec(array.shape, lambda tile, g, b: (0,) * array.ndim)

    def with_points(*refs):
        refs = iter(refs)
        fields = [type(p)(*itertools.islice(refs, len(p))) for p in all_points]
        token = _interpreted.set(interpret)
        try:
            kernel(*fields, *refs)
        finally:
            _interpreted.reset(token)

    def specs_of(points):
        yield from map(per_token_spec, points.per_query)
        yield from (pl.BlockSpec((None,), lambda tile, g, b: (g,)) for _ in points.per_group)
        yield from map(constant_spec, points.constant)

    batch, _, groups = outputs[0].shape[:3]
    return pl.pallas_call(
        with_points,
        grid=(tiles, groups, batch),  # groups next to one another share cache lines
        in_specs=[
            *itertools.chain(*map(specs_of, all_points)),
            *map(per_token_spec, inputs),
        ],
        out_specs=[*map(per_token_spec, outputs)],
        out_shape=list(outputs),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*itertools.chain(*all_points), *inputs)


def tile_number() -> jax.Array:
    return pl.program_id(0)


def iota(size: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def to_float32(x: jax.Array) -> jax.Array:
    """x in float32. Triton takes three instructions for two bfloat16; this takes two."""
    if x.dtype != jnp.bfloat16 or x.shape[-1] % 2 or _interpreted.get():
        return x.astype(jnp.float32)
    [x] = plgpu.elementwise_inline_asm(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        args=[x],
        constraints="=r,=r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return x


def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """a * b + c in float32, rounded once. XLA compiles Triton code without contracting it so."""
    shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
    a, b, c = (jnp.broadcast_to(x, shape) for x in (a, b, c))
    if _interpreted.get():
        return a * b + c
    return _float32_asm("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def tent(distance: jax.Array) -> jax.Array:
    """max(0, 1 - |distance|) in float32, in one instruction where it would be two."""
    if _interpreted.get():
        return jnp.maximum(0.0, 1.0 - jnp.abs(distance))
    return _float32_asm("{ .reg .f32 a; abs.f32 a, $1; sub.sat.f32 $0, 0f3F800000, a; }", distance)


def _float32_asm(asm: str, *args: jax.Array) -> jax.Array:
    """PTX that makes one float32 of one float32 of each argument; all have the same shape."""
    [result] = plgpu.elementwise_inline_asm(
        asm,
        args=args,
        constraints=",".join(["=f", *("f" for _ in args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return result


def opaque_zero(dtype) -> jax.Array:
    """A zero that the compiler can't see through; call it outside of loops."""
    return (tile_number() < 0).astype(dtype)


def matrix_of_zeros(rows: int, columns: int, zero: jax.Array) -> jax.Array:
    """Float32 zeros, laid out over the threads as the result of a matrix product is.

    Each thread then holds a few columns of few rows, so that what is computed from a row's or a
    column's number alone is computed once for many elements; and the matrix, cast to 16 bits, goes
    into the next product without a detour through shared memory. Triton has no name for such a
    layout, so this asks for a product of zeros; `zero` is `opaque_zero` of a 16-bit type.
    """
    return dot(jnp.full((rows, MIN_DOT), zero), jnp.full((MIN_DOT, columns), zero))


def take(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index] of one-dimensional arrays, through shared memory; `index` must be inside."""
    if _interpreted.get():
        return table[index]
    return _take_p.bind(table, index)


def columns(matrix: jax.Array) -> list[jax.Array]:
    """The columns, a power of two of them, one by one."""
    parts = jax.lax.split(matrix, (1,) * matrix.shape[1], axis=1)
    return [part.reshape(matrix.shape[0]) for part in parts]


# Triton's own gather, which Pallas does not offer.
_take_p = Primitive("triton_take")


@_take_p.def_abstract_eval
def _take_abstract(table, index):
    return jax.core.ShapedArray(index.shape, table.dtype)


@triton_lowering.register_lowering(_take_p)
def _take_lowering(ctx, table, index):
    del ctx
    return triton_dialect.gather(table, index, 0)
