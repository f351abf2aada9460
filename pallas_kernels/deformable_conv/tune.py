"""Searches block sizes of the kernels for one shape: on an NVIDIA GPU,

    python -m pallas_kernels.deformable_conv.tune --shape=64,16,16,16,72,9 --dtype=bfloat16

It prints the time of each candidate, best first, and which one `blocks.py` takes. Nothing is tuned
while training: a better choice belongs into `blocks.choose`.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import (
    blocks,
    gather,
    list_gradient,
    products,
    row_gather,
    row_products,
    row_slices,
    sparse_matrix,
    sparse_transpose,
    tent,
)
from pallas_kernels.deformable_conv.api import VALUE_DTYPES, why_not_pallas
from pallas_kernels.deformable_conv.grid import Grid
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES, model_inputs
from pallas_kernels.deformable_conv.points import flatten_points, flatten_tokens
from pallas_kernels.devices import is_hopper
from pallas_kernels.timing import compile_calls, milliseconds

DEFAULT_SHAPE = ",".join(map(str, NAMED_SHAPES["XL at 256"]))


def _forward(kernel: Callable, values, points):
    return kernel(values, points)


def _values_gradient(kernel: Callable, d_out, points):
    return kernel(points, d_out)


def _point_gradients(kernel: Callable, weights, values, points, d_out):
    d_directions, d_scales, d_weights, *others = jax.tree.leaves(
        kernel(values, points._replace(weights=weights), d_out)
    )
    return d_weights, d_directions, d_scales, *others


# Of each kernel, a function whose first result can take its first argument's place, and the
# arguments: values, weights, points, d out.
_CHAINED = {
    "forward": (_forward, "vp"),
    "values_gradient": (_values_gradient, "dp"),
    "point_gradients": (_point_gradients, "wvpd"),
}


_KINDS = (
    blocks.Gather,
    blocks.RowGather,
    blocks.RowProducts,
    blocks.RowSlices,
    blocks.PointLists,
    blocks.SparseMatrix,
    blocks.Product,
    blocks.TransposedProduct,
)


def _candidates(shape, dtype) -> Iterator[tuple[str, object, Callable]]:
    """(kernel, block sizes, function)."""
    h, w = shape[1:3]
    tile = functools.partial(blocks.tile, w=w)
    wide = jnp.dtype(dtype).itemsize > 2
    options = dict(boundary="zeros", interpret=False)

    def grids(queries, tokens):
        return dict(queries=Grid(h, w, *queries), tokens=Grid(h, w, *tokens))

    for chunk in (8, 16, 32, 64):
        for num_warps in (1, 2, 4):
            for queries in (8, 16, 32, 64):
                b = blocks.Gather(tile(queries, 8), chunk, num_warps)
                extra = dict(grid=Grid(h, w, *b.tile), chunk=chunk, num_warps=num_warps)
                yield "forward", b, functools.partial(gather.forward, **extra, **options)
    gathers = []
    if is_hopper() and row_gather.why_not(h, w, shape[4], shape[5]) is None:
        gathers.append((row_gather, blocks.RowGather))
    if is_hopper() and row_products.why_not(h, w, shape[4], shape[5], dtype) is None:
        gathers.append((row_products, blocks.RowProducts))
    for module, kind in gathers:
        for kernel, num_warps in itertools.product(("forward", "point_gradients"), (4, 8, 12, 16)):
            extra = dict(h=h, w=w, num_warps=num_warps)
            if kernel == "point_gradients":
                extra["dtypes"] = (jnp.dtype(dtype),) * 3
            run = getattr(module, kernel)
            yield kernel, kind(num_warps), functools.partial(run, **extra, **options)
    if is_hopper() and row_slices.why_not(h, w, shape[4], shape[5], dtype) is None:
        for num_warps in (4, 8, 12, 16):
            extra = dict(h=h, w=w, num_warps=num_warps)
            run = functools.partial(row_slices.forward, **extra, **options)
            yield "forward", blocks.RowSlices(num_warps), run
    if is_hopper() and list_gradient.why_not(h, w, shape[4], shape[5], dtype) is None:
        for num_warps in (4, 8):
            run = functools.partial(
                list_gradient.values_gradient, h=h, w=w, num_warps=num_warps, **options
            )
            yield "values_gradient", blocks.PointLists(num_warps), run
    if is_hopper() and sparse_matrix.why_not(h, w, shape[4], shape[5], dtype) is None:
        for kernel, b in _sparse_matrices(h, w, shape[4]):
            extra = dict(h=h, w=w, **b._asdict())
            if kernel == "point_gradients":
                extra["dtypes"] = (jnp.dtype(dtype),) * 3
            module = sparse_transpose if kernel == "values_gradient" else sparse_matrix
            run = getattr(module, kernel)
            yield kernel, b, functools.partial(run, **extra, **options)
    sizes = [(q, t, n) for q in (16, 32, 64, 128) for t in (32, 64, 128, 256) for n in (4, 8)]
    for q, t, num_warps in sizes:
        width = 16 if h * w <= 256 else 8
        query_tile, token_tile = tile(q, width), tile(t, 16)
        b = blocks.Product(query_tile, token_tile, num_warps)
        extra = dict(num_warps=num_warps, **grids(query_tile, token_tile))
        if not wide and q >= 64:
            yield "forward", b, functools.partial(tent.forward, **extra, **options)
        dtypes = (jnp.dtype(dtype),) * 3
        run = functools.partial(products.point_gradients, dtypes=dtypes, **extra, **options)
        yield "point_gradients", b, run
        for many in (1, 2, 4) if t <= 64 else (1,):
            for skip in (False, True) if many == 1 and h * w > 256 else (False,):
                b = blocks.TransposedProduct(query_tile, token_tile, many, skip, num_warps)
                more = dict(tiles_per_program=many, skip=skip)
                run = functools.partial(tent.values_gradient, **more, **extra, **options)
                yield "values_gradient", b, run


def _sparse_matrices(h: int, w: int, channels: int) -> Iterator:
    """(kernel, block sizes)."""
    for window in (2, 4, 8, 16):
        for num_warps in (4, 8, 12):
            b = blocks.SparseMatrix(window, num_warps)
            if sparse_matrix.fits(h, w, channels, **b._asdict()):
                yield "point_gradients", b
            if window % num_warps == 0:
                yield "values_gradient", b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default=DEFAULT_SHAPE, help="B,h,w,G,C,K")
    parser.add_argument("--dtype", default="bfloat16", choices=VALUE_DTYPES)
    parser.add_argument("--kernel", choices=blocks.Blocks._fields, help="only this one")
    kinds = [kind.__name__ for kind in _KINDS]
    parser.add_argument("--kind", choices=kinds, help="only block sizes of this one")
    parser.add_argument("--show", type=int, default=8, help="candidates to print of each kernel")
    args = parser.parse_args()
    shape = tuple(int(size) for size in args.shape.split(","))
    if len(shape) != 6 or min(shape) < 1:
        parser.error(f"--shape is {args.shape!r}; expected six positive numbers B,h,w,G,C,K")
    if reason := why_not_pallas():
        parser.exit(2, f"can't tune here: {reason}\n")

    values, points, d_out = model_inputs(shape, args.dtype)
    values, points, d_out = flatten_tokens(values), flatten_points(points), flatten_tokens(d_out)
    arrays = {"v": values, "w": points.weights, "p": points, "d": d_out}
    inputs = {kernel: [arrays[i] for i in takes] for kernel, (_, takes) in _CHAINED.items()}
    candidates = [
        candidate
        for candidate in _candidates(shape, args.dtype)
        if args.kernel in (None, candidate[0]) and args.kind in (None, type(candidate[1]).__name__)
    ]

    def compiled(candidate) -> Callable | None:
        kernel, sizes, run = candidate
        try:
            return compile_calls(functools.partial(_CHAINED[kernel][0], run), *inputs[kernel])
        except Exception as error:  # too large for the GPU, in one of many ways
            print(f"{kernel} {sizes}: {str(error).splitlines()[0][:100]}", flush=True)
            return None

    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(compiled, candidates))
    times = {}
    for (kernel, sizes, _), calls in zip(candidates, programs, strict=True):
        if calls is not None:
            ms = milliseconds(calls, *inputs[kernel], runs=3)
            times.setdefault(kernel, []).append((ms, sizes))
    chosen = blocks.choose(*shape[1:3], *shape[4:], args.dtype, hopper=is_hopper())._asdict()
    for kernel, found in times.items():
        print(f"{kernel}: now {chosen[kernel]}")
        for ms, sizes in sorted(found, key=lambda entry: entry[0])[: args.show]:
            print(f"  {ms:8.4f} ms  {sizes}")


if __name__ == "__main__":
    main()
