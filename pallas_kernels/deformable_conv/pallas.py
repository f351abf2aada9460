"""The deformable aggregation by Pallas kernels, for NVIDIA GPUs.

The forward multiplies by the interpolation matrix (`tent.py`) where there are few tokens, and
gathers (`gather.py`) elsewhere. Backward, the gradient of the values is a product with the
transposed matrix (`tent.py`), and those of the sampling points come from products of rows
(`products.py`). On Hopper most of it is done in shared memory, by gathers (`row_products.py`,
`row_slices.py`, `row_gather.py`) or by the interpolation matrix (`sparse_matrix.py`,
`sparse_transpose.py`), or from sorted points (`list_gradient.py`). The tangent is done as the
forward, by twice as many rows. `blocks.choose` and `blocks.choose_tangent` decide. Arrays with more
elements than int32 counts are left to plain JAX. Nothing is added up in an order that changes from
run to run.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.deformable_conv import backends
from pallas_kernels.deformable_conv.blocks import (
    MAX_CHANNELS,
    Gather,
    PointLists,
    Product,
    RowGather,
    RowProducts,
    RowSlices,
    SparseMatrix,
    TransposedProduct,
    choose,
    choose_tangent,
    why_not_backward,
    why_not_forward,
)
from pallas_kernels.deformable_conv.derivatives import Rules, differentiable
from pallas_kernels.deformable_conv.limits import product_dtype
from pallas_kernels.deformable_conv.points import (
    TANGENT_OF,
    Multiscale,
    Offsets,
    Points,
    flatten_points,
    flatten_tokens,
)
from pallas_kernels.deformable_conv.xla import deformable_aggregate_xla
from pallas_kernels.devices import is_hopper


def deformable_aggregate_pallas(
    values: jax.Array,
    points: Points,
    boundary: str,
    interpret: bool = False,
    or_xla: bool = False,
) -> jax.Array:
    """`api.deformable_aggregate` without its checks.

    `interpret` runs the kernels on any platform, slowly, for tests. With `or_xla` plain JAX does
    what is too large for them on a device, which otherwise is a ValueError.
    """
    return _differentiable(type(points), boundary, interpret, or_xla)(values, *points)


@functools.cache
def _differentiable(form: type, *options) -> Callable:
    """The operator of (values, *points)."""

    def run(function, *arrays):
        return _sharded(function, form, *options)(*arrays)

    def backward(inputs, d_out):
        d_values, *d_points = run(_backward, *inputs, d_out)
        if form is not Multiscale:
            return d_values, *d_points
        # Each group's prior moves all of its scales.
        return d_values, *d_points, jnp.sum(d_points[1].astype(jnp.float32), axis=(0, 1, 2, 4))

    rules = Rules(
        forward=lambda *inputs: run(_forward, *inputs)[0],
        backward=backward,
        tangent=lambda *arrays: run(_tangent, *arrays)[0],
        inputs=(_VALUES, *_FIELDS[form]),
        moving=1 + len(_moving(form)),
    )
    return differentiable(rules)


# --- one device --------------------------------------------------------------------------------

# Of what each does the function in a module, which is imported when it is chosen.
_MODULES = {
    "forward": {
        Gather: "gather",
        Product: "tent",
        RowGather: "row_gather",
        RowProducts: "row_products",
        RowSlices: "row_slices",
    },
    "tangent": {Gather: "gather", RowProducts: "row_products", RowSlices: "row_slices"},
    "point_gradients": {
        Product: "products",
        RowGather: "row_gather",
        RowProducts: "row_products",
        SparseMatrix: "sparse_matrix",
    },
    "values_gradient": {
        PointLists: "list_gradient",
        SparseMatrix: "sparse_transpose",
        TransposedProduct: "tent",
    },
}


def kernel_of(function: str, tiling, h: int, w: int) -> Callable:
    """What does "forward", "tangent", "point_gradients" or "values_gradient" with `tiling`.

    A function of arrays with flattened tokens and the keywords boundary and interpret, as its
    module says, of images of h x w tokens.
    """
    name = _MODULES[function][type(tiling)]
    module = importlib.import_module(f"pallas_kernels.deformable_conv.{name}")
    return functools.partial(getattr(module, function), **tiling.options(h, w))


def _forward(form: type, boundary: str, interpret: bool, or_xla: bool, values, *fields):
    """(out,)."""
    points, (h, w) = form(*fields), values.shape[1:3]
    tiling = choose(*_sizes(values, points), hopper=_by_mosaic_gpu(interpret)).forward
    if _left_to_xla(why_not_forward(values, points, tiling), or_xla):
        return (deformable_aggregate_xla(values, points, boundary),)
    points = flatten_points(points)
    forward = functools.partial(
        kernel_of("forward", tiling, h, w), boundary=boundary, interpret=interpret
    )
    parts = [forward(part, points) for part in _channel_parts(flatten_tokens(values))]
    return (jnp.concatenate(parts, axis=-1).reshape(values.shape),)


def _tangent(form: type, boundary: str, interpret: bool, or_xla: bool, values, *others):
    """(tangent of out,), of (values, *points) and the tangents of those that move."""
    count, (h, w) = len(_FIELDS[form]), values.shape[1:3]
    points, d_values, moved = form(*others[:count]), others[count], others[count + 1 :]
    tiling = choose_tangent(*_sizes(values, points), hopper=_by_mosaic_gpu(interpret))
    if _left_to_xla(why_not_forward(values, points, tiling), or_xla):
        constants = (jnp.zeros_like(x) for x in points.constant)
        plain = functools.partial(deformable_aggregate_xla, boundary=boundary)
        d_points = form(*moved, *constants)
        return (jax.jvp(plain, (values, points), (d_values, d_points))[1],)
    points, along = flatten_points(points), flatten_points(TANGENT_OF[form](*moved))
    tangent = functools.partial(
        kernel_of("tangent", tiling, h, w), boundary=boundary, interpret=interpret
    )
    both = (_channel_parts(flatten_tokens(x)) for x in (values, d_values))
    parts = [tangent(x, points, d_x, along) for x, d_x in zip(*both, strict=True)]
    return (jnp.concatenate(parts, axis=-1).reshape(values.shape),)


def _backward(form: type, boundary: str, interpret: bool, or_xla: bool, values, *fields_and_d_out):
    """(d values, gradients of the per-query fields of the points)."""
    *fields, d_out = fields_and_d_out
    points, (h, w) = form(*fields), values.shape[1:3]
    inputs = (values, *points.per_query)
    blocks = choose(*_sizes(values, points), hopper=_by_mosaic_gpu(interpret))
    if _left_to_xla(why_not_backward(values, points, blocks), or_xla):
        plain = functools.partial(deformable_aggregate_xla, boundary=boundary)
        d_values, d_points = jax.vjp(plain, values, points)[1](d_out)
        return d_values, *d_points.per_query
    points = flatten_points(points)
    values_parts, d_out_parts = (_channel_parts(flatten_tokens(x)) for x in (values, d_out))
    several, options = len(d_out_parts) > 1, dict(boundary=boundary, interpret=interpret)

    tiling = blocks.point_gradients
    point_gradients = functools.partial(
        kernel_of("point_gradients", tiling, h, w),
        dtypes=tuple(jnp.float32 if several else x.dtype for x in points.per_query),
        **options,
    )
    d_points, extents = [], None
    for values_part, d_out_part in zip(values_parts, d_out_parts, strict=True):
        found = point_gradients(values_part, points, d_out_part)
        if not isinstance(tiling, Product):  # all channels are one part
            found, extents = found
        d_points.append(found)
    d_points = jax.tree.map(lambda *parts: sum(parts), *d_points)

    tiling = blocks.values_gradient
    values_gradient = functools.partial(kernel_of("values_gradient", tiling, h, w), **options)
    if isinstance(tiling, SparseMatrix):
        values_gradient = functools.partial(values_gradient, extents=extents)
    elif isinstance(tiling, TransposedProduct) and tiling.skip:
        points = points.to_offsets()  # each is wanted by several tiles of tokens
    dtype = product_dtype(values.dtype, points.weights.dtype)
    d_values = [values_gradient(points, part.astype(dtype)) for part in d_out_parts]
    gradients = (jnp.concatenate(d_values, axis=-1), *d_points)
    return tuple(
        x.astype(like.dtype).reshape(like.shape) for x, like in zip(gradients, inputs, strict=True)
    )


def _sizes(values, points: Points) -> tuple:
    """h, w, channels, points, dtypes of values and weights: what kernels are chosen by."""
    h, w, _, channels = values.shape[1:]
    return h, w, channels, points.weights.shape[-1], values.dtype, points.weights.dtype


def _by_mosaic_gpu(interpret: bool) -> bool:
    """Whether Hopper's kernels can be chosen."""
    return not interpret and is_hopper() and backends.why_not(backends.MOSAIC_GPU) is None


def _left_to_xla(reason: str | None, or_xla: bool) -> bool:
    """Whether plain JAX has to do what the kernels can't, for a reason."""
    if reason and not or_xla:
        raise ValueError(
            f"implementation is 'pallas', whose kernels can't take such arrays: {reason}. Split "
            "the batch, or leave the choice of an implementation out"
        )
    return reason is not None


def _channel_parts(array: jax.Array) -> list[jax.Array]:
    count = -(-array.shape[-1] // MAX_CHANNELS)
    return jnp.array_split(array, count, axis=-1) if count > 1 else [array]


# --- many devices, and vmap --------------------------------------------------------------------

# Axes of each array, by the names of custom_partitioning's sharding rules.
_VALUES = "b h w g c"
_FIELDS = {
    Offsets: ("b h w g k t", "b h w g k"),
    Multiscale: ("b h w g k t", "b h w g k", "b h w g k", "g", "k t", "t"),
}
_PER_QUERY = {Offsets: 2, Multiscale: 3}
_SHARDABLE = ("b", "g")  # images and groups have nothing to do with one another


@functools.cache
def _sharded(
    function: Callable, form: type, boundary: str, interpret: bool, or_xla: bool
) -> Callable:
    """`function` of (values, *points, *others), run by each device on its images and groups.

    Under vmap the mapped axis becomes a part of the batch.
    """
    others, results = {
        _forward: ((), (_VALUES,)),
        _backward: ((_VALUES,), (_VALUES, *_FIELDS[form][: _PER_QUERY[form]])),
        _tangent: ((_VALUES, *_moving(form)), (_VALUES,)),
    }[function]
    arguments = (_VALUES, *_FIELDS[form], *others)
    local = functools.partial(function, form, boundary, interpret, or_xla)
    split = custom_partitioning(local)

    def shardings(mesh, arg_infos, axes):
        spec = tuple(arg_infos[0].sharding.spec) + (None,) * 5
        names = {"b": spec[0], "g": spec[3]}
        return tuple(
            NamedSharding(mesh, PartitionSpec(*(names.get(name) for name in array.split())))
            for array in axes
        )

    def partition(mesh, arg_infos, result_infos):
        del result_infos
        return (
            mesh,
            local,
            shardings(mesh, arg_infos, results),
            shardings(mesh, arg_infos, arguments),
        )

    split.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, args, _: shardings(mesh, args, results),
        sharding_rule=f"{', '.join(arguments)} -> {', '.join(results)}",
        need_replication_factors=("h", "w", "c", "k", "t"),
    )
    return _mapped_as_batch(split, arguments)


def _moving(form: type) -> tuple[str, ...]:
    """Of the fields that are no constants."""
    return _FIELDS[form][: len(TANGENT_OF[form]._fields)]


def _mapped_as_batch(function: Callable, arguments: tuple[str, ...]) -> Callable:
    function = custom_vmap(function)

    @function.def_vmap
    def rule(axis_size, is_mapped, *args):
        shared = [m for m, axes in zip(is_mapped, arguments, strict=True) if not axes[0] == "b"]
        if any(shared):  # a scale prior for each: one after the other
            outputs = [
                function(*(a[i] if m else a for a, m in zip(args, is_mapped, strict=True)))
                for i in range(axis_size)
            ]
            stacked = tuple(jnp.stack(parts) for parts in zip(*outputs, strict=True))
            return stacked, tuple(True for _ in stacked)
        merged = []
        for array, mapped, axes in zip(args, is_mapped, arguments, strict=True):
            if axes[0] == "b":
                if not mapped:
                    array = jnp.broadcast_to(array, (axis_size, *array.shape))
                array = array.reshape(-1, *array.shape[2:])
            merged.append(array)
        outputs = function(*merged)
        outputs = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in outputs)
        return outputs, tuple(True for _ in outputs)

    return function
