"""The kernels of `gating.swiglu`."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ROWS, COLUMNS, WARPS = 1, 1024, 4  # of a program; eight choices measured alike


def forward(both, *, interpret: bool):
    """(out [..., F],) of both [..., 2F]."""
    out = jax.ShapeDtypeStruct((*both.shape[:-1], both.shape[-1] // 2), both.dtype)
    return (_launch(_forward_kernel, (both,), out, interpret=interpret, name="swiglu"),)


def backward(both, d_out, *, interpret: bool):
    """(d both,)."""
    out = jax.ShapeDtypeStruct(both.shape, both.dtype)
    inputs = both, d_out
    return (_launch(_backward_kernel, inputs, out, interpret=interpret, name="swiglu_backward"),)


def _launch(kernel, inputs, output, *, interpret: bool, name: str):
    shape = output.shape
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    tokens, half = flat[0].shape[0], flat[0].shape[1] // 2
    columns = -(-half // COLUMNS)
    whole = [pl.BlockSpec(x.shape, lambda program: (0, 0)) for x in flat]
    out = jax.ShapeDtypeStruct((tokens, shape[-1]), output.dtype)
    result = pl.pallas_call(
        functools.partial(kernel, half=half, columns=columns),
        grid=(columns * -(-tokens // ROWS),),
        in_specs=whole,
        out_specs=pl.BlockSpec(out.shape, lambda program: (0, 0)),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*flat)
    return result.reshape(shape)


def _tile(reference, half: int, columns: int):
    """Rows, columns and mask (None: all are there) of this program's part of one half."""
    row, column = pl.program_id(0) // columns, pl.program_id(0) % columns
    rows = row * ROWS + jax.lax.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 0)
    columns = column * COLUMNS + jax.lax.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 1)
    mask = None
    if half % COLUMNS:
        mask = columns < half
    if reference.shape[0] % ROWS:
        inside = rows < reference.shape[0]
        mask = inside if mask is None else mask & inside
    return rows, columns, mask


def _load(reference, rows, columns, mask):
    other = None if mask is None else 0.0
    return plgpu.load(reference.at[rows, columns], mask=mask, other=other).astype(jnp.float32)


def _forward_kernel(both, out, *, half: int, columns: int):
    rows, columns, mask = _tile(both, half, columns)
    gate, up = _load(both, rows, columns, mask), _load(both, rows, columns + half, mask)
    result = gate * jax.nn.sigmoid(gate) * up
    plgpu.store(out.at[rows, columns], result.astype(out.dtype), mask=mask)


def _backward_kernel(both, d_out, d_both, *, half: int, columns: int):
    rows, columns, mask = _tile(both, half, columns)
    gate, up = _load(both, rows, columns, mask), _load(both, rows, columns + half, mask)
    d = _load(d_out, rows, columns, mask)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d * up * (sigmoid + silu * (1.0 - sigmoid))
    plgpu.store(d_both.at[rows, columns], d_gate.astype(d_both.dtype), mask=mask)
    plgpu.store(d_both.at[rows, columns + half], (d * silu).astype(d_both.dtype), mask=mask)
