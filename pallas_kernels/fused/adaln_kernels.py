"""The kernels of `adaln.residual_adaln`.

A program has some tokens of an image. It reads each once, backward too: the next rows are on their
way while these are computed; sums over channels and tokens stay in registers. An image's sums over
its tokens leave in parts, one a program, which XLA adds up: every run adds in the same order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.fused.blocks import Rows, load_vector, store_vector
from pallas_kernels.fused.norm import Norm


class Tiling(NamedTuple):
    warps: int  # of a program
    rows: int  # tokens at a time, a power of two
    tokens: int  # of a program, a multiple of rows


def forward_tiling(width: int) -> Tiling:
    """The fastest measured of nine at width 1152, and of five at 384, on an H200."""
    return Tiling(1, 2, 8) if width <= 512 else Tiling(4, 1, 16)


def backward_tiling(width: int) -> Tiling:
    """The fastest measured of fourteen at width 1152, and of eight at 384, on an H200."""
    return Tiling(1 if width <= 512 else 4, 2, 64)


def forward(x, mixed, *vectors, norm: Norm, interpret: bool):
    """(y, h) of tokens x, mixed [B,T,D] and of gate, factor, shift [B,D] and perhaps bias [D]."""
    tiling = forward_tiling(x.shape[-1])
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _launch(
        functools.partial(_forward_kernel, norm=norm, tiling=tiling),
        (x, mixed, *vectors),
        (out, out),
        (),
        tiling=tiling,
        interpret=interpret,
        name="residual_adaln",
    )


def backward(x, mixed, *others, norm: Norm, has_bias: bool, interpret: bool):
    """Cotangents of `forward`'s inputs, given those of y and h last; of the bias a row an image."""
    *vectors, d_y, d_h = others
    gate, factor, _, *bias = vectors
    batch, length, width = x.shape
    tiling = backward_tiling(width)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    part = jax.ShapeDtypeStruct((batch, _tiles(length, tiling), width), jnp.float32)
    d_x, d_mixed, *parts = _launch(
        functools.partial(_backward_kernel, norm=norm, tiling=tiling, has_bias=has_bias),
        (x, mixed, d_h, d_y, gate, factor, *bias),
        (out, out),
        (part,) * (4 if has_bias else 3),
        tiling=tiling,
        interpret=interpret,
        name="residual_adaln_backward",
    )
    d_gate, d_factor, d_shift, *d_total = (jnp.sum(part, axis=1) for part in parts)
    return d_x, d_mixed, d_gate, d_factor, d_shift, *(gate * total for total in d_total)


def _launch(kernel, inputs, outputs, parts, *, tiling: Tiling, interpret: bool, name: str):
    """Runs `kernel` on every few tokens of every image; gives the outputs, then the parts.

    It gets references to an image's tokens [T,D], to vectors [D], and for each of the parts, of
    sums [B,programs,D], to what is this program's [D].
    """
    batch, length, width = inputs[0].shape
    tiles = _tiles(length, tiling)

    def spec(array):
        if array.ndim == 1:
            return pl.BlockSpec((width,), lambda program: (0,))
        if array.ndim == 2:
            return pl.BlockSpec((None, width), lambda program: (program // tiles, 0))
        return pl.BlockSpec((None, length, width), lambda program: (program // tiles, 0, 0))

    def own_part(program):
        return program // tiles, program % tiles, 0

    return pl.pallas_call(
        kernel,
        grid=(tiles * batch,),
        in_specs=list(map(spec, inputs)),
        out_specs=[
            *map(spec, outputs),
            *[pl.BlockSpec((None, None, width), own_part)] * len(parts),
        ],
        out_shape=[*outputs, *parts],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*inputs)


def _tiles(length: int, tiling: Tiling) -> int:
    """Programs an image."""
    return -(-length // tiling.tokens)


def _rows_of(reference, tiling: Tiling):
    """The function from a step of this program to its `Rows`."""
    length, width = reference.shape
    first = pl.program_id(0) % _tiles(length, tiling) * tiling.tokens

    def rows(step) -> Rows:
        tokens = jax.lax.broadcasted_iota(jnp.int32, (tiling.rows, 1), 0)
        tokens += first + step * tiling.rows
        inside = None if length % tiling.tokens == 0 else tokens < length
        return Rows(width, tokens, inside, warps=tiling.warps)

    return rows


def _float32(blocks):
    return [block.astype(jnp.float32) for block in blocks]


def _residual(x, mixed, gate, bias, dtype):
    """(mixed + bias, x + gate (mixed + bias) rounded to `dtype`), both float32 blocks."""
    mixed = _float32(mixed)
    if bias:
        mixed = [m + b for m, b in zip(mixed, bias[0], strict=True)]
    y = [a + g * m for a, g, m in zip(_float32(x), gate, mixed, strict=True)]
    return mixed, _float32([block.astype(dtype) for block in y])


def _forward_kernel(x, mixed, *refs, norm: Norm, tiling: Tiling):
    *vectors, y, h = refs
    gate, factor, shift, *bias = (load_vector(vector, tiling.warps) for vector in vectors)
    rows_of = _rows_of(x, tiling)

    def one(step, _):
        rows = rows_of(step)
        _, out = _residual(rows.load(x), rows.load(mixed), gate, bias, y.dtype)
        row = rows.less_mean(out) if norm.centred else out
        inverse = jax.lax.rsqrt(rows.mean([r * r for r in row]) + norm.epsilon)
        modulated = [r * inverse * f + s for r, f, s in zip(row, factor, shift, strict=True)]
        rows.store(y, out)
        rows.store(h, modulated)
        return 0

    jax.lax.fori_loop(0, tiling.tokens // tiling.rows, one, 0)


def _backward_kernel(x, mixed, d_h, d_y, *refs, norm: Norm, tiling: Tiling, has_bias: bool):
    vectors, (d_x, d_mixed, *parts) = refs[: 2 + has_bias], refs[2 + has_bias :]
    gate, factor, *bias = (load_vector(vector, tiling.warps) for vector in vectors)
    rows_of, steps = _rows_of(x, tiling), tiling.tokens // tiling.rows

    def load(step):
        return [rows_of(step).load(reference) for reference in (x, mixed, d_h, d_y)]

    def one(step, carry):
        sums, now = carry
        following = load(jnp.minimum(step + 1, steps - 1))
        rows, d_row = rows_of(step), _float32(now[2])
        added, row = _residual(now[0], now[1], gate, bias, x.dtype)
        if norm.centred:
            row = rows.less_mean(row)
        inner = [d * f for d, f in zip(d_row, factor, strict=True)]
        inverse = jax.lax.rsqrt(rows.mean([r * r for r in row]) + norm.epsilon)
        along = rows.mean([r * i for r, i in zip(row, inner, strict=True)]) * inverse**2
        mean = rows.mean(inner) if norm.centred else 0.0
        d_norm = [i - r * along - mean for r, i in zip(row, inner, strict=True)]
        total = [d + inverse * n for d, n in zip(_float32(now[3]), d_norm, strict=True)]
        rows.store(d_x, total)
        rows.store(d_mixed, [g * t for g, t in zip(gate, total, strict=True)])
        terms = (
            [t * a for t, a in zip(total, added, strict=True)],  # of the gate
            [d * (r * inverse) for d, r in zip(d_row, row, strict=True)],  # of the factor
            d_row,  # of the shift
            total,  # of the bias
        )
        return jax.tree.map(jnp.add, sums, terms[: len(parts)]), following

    sizes = [block.shape[1] for block in gate]
    zeros = [jnp.zeros((tiling.rows, size), jnp.float32) for size in sizes]
    sums, _ = jax.lax.fori_loop(0, steps, one, ((zeros,) * len(parts), load(0)))
    for reference, blocks in zip(parts, sums, strict=True):
        store_vector(reference, [jnp.sum(block, axis=0) for block in blocks], tiling.warps)
