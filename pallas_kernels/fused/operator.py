"""From two kernels, one forward and one backward, to an operator that JAX can transform.

Its derivative along a direction is that of its plain JAX, as a primitive that is linear in the
direction; the transpose of that primitive, which is all that `jax.grad` meets, is the backward
kernel. So both modes work, and `jax.grad` runs kernels alone.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.devices import why_no_nvidia_kernels

MAX_ELEMENTS = 2**31
BATCH = "b"  # the one axis that may be split over devices


def takes_kernels(dtype) -> bool:
    """Whether the kernels serve arrays of `dtype` on JAX's default device: 16 bits, NVIDIA.

    They are written for Pallas' Triton, without which there are none.
    """
    return jnp.dtype(dtype).itemsize == 2 and why_no_nvidia_kernels() is None and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def make_operator(
    name: str,
    plain: Callable,
    forward: Callable,
    backward: Callable,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Callable:
    """An operator of arrays, which returns a tuple of them.

    Args:
        name: of the primitive, as it shows in a jaxpr.
        plain: the operator in plain JAX.
        forward: the same by a kernel.
        backward: (*inputs, *cotangents of the outputs) -> cotangents of the inputs, by a kernel;
            those of an input without an axis "b" have one, over which they are still to be summed.
        inputs: the axes of each input, such as "b t d"; of what has no axis "b" all devices and
            all of a mapped axis use the same.
        outputs: the axes of each output.
    """
    gradients = tuple(axes if BATCH in axes.split() else f"{BATCH} {axes}" for axes in inputs)

    def forward_of_any_size(*args):
        return (forward if _indexable(args) else plain)(*args)

    def backward_of_any_size(*args):
        if _indexable(args):
            return backward(*args)
        found = jax.vjp(plain, *args[: len(inputs)])[1](tuple(args[len(inputs) :]))
        return [g if BATCH in a.split() else g[None] for g, a in zip(found, inputs, strict=True)]

    run_forward = _distributed(forward_of_any_size, tuple(inputs), tuple(outputs))
    run_backward = _distributed(backward_of_any_size, (*inputs, *outputs), gradients)
    operator = jax.custom_jvp(lambda *args: run_forward(*args))

    def tangent(*args):
        """The derivative at the first half of `args` along the second half."""
        half = len(args) // 2
        return jax.jvp(plain, args[:half], args[half:])[1]

    primitive = core.Primitive(f"{name}_tangent")
    primitive.multiple_results = True
    primitive.def_impl(lambda *args: jax.jit(tangent)(*args))

    @primitive.def_abstract_eval
    def _(*args):
        shapes = [jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args]
        out = jax.eval_shape(tangent, *shapes)
        return [jax.core.ShapedArray(array.shape, array.dtype) for array in out]

    def jvp(primals, tangents):
        return jax.jvp(tangent, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))

    def transpose(cotangents, *args):
        half = len(args) // 2
        if all(type(each) is ad.Zero for each in cotangents):
            return [None] * len(args)
        found = run_backward(*args[:half], *map(ad.instantiate_zeros, cotangents))
        found = [
            g if BATCH in axes.split() else jnp.sum(g, axis=0)
            for g, axes in zip(found, inputs, strict=True)
        ]
        wanted = [ad.is_undefined_primal(arg) for arg in args[half:]]
        return [None] * half + [g if w else None for g, w in zip(found, wanted, strict=True)]

    def batch(args, axes):
        out = jax.vmap(tangent, in_axes=tuple(axes))(*args)
        return out, [0] * len(out)

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(tangent, multiple_results=True))

    @operator.defjvp
    def _(primals, tangents):
        return operator(*primals), tuple(primitive.bind(*primals, *tangents))

    return operator


def _indexable(arrays) -> bool:
    """Whether the kernels' int32 reaches all elements; plain JAX does what is larger."""
    return all(array.size < MAX_ELEMENTS for array in arrays)


def _distributed(function: Callable, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Callable:
    """`function`, run by each device on its part of the batch; a mapped axis joins the batch."""

    def local(*args):
        return tuple(function(*args))

    split = custom_partitioning(local)

    def shardings(mesh, arg_infos, arrays):
        batch = [i for i, axes in enumerate(inputs) if axes.split()[0] == BATCH][0]
        spec = tuple(arg_infos[batch].sharding.spec) or (None,)
        specs = (spec[:1] if axes.split()[0] == BATCH else () for axes in arrays)
        return tuple(NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs)

    def partition(mesh, arg_infos, result_infos):
        del result_infos
        return mesh, local, shardings(mesh, arg_infos, outputs), shardings(mesh, arg_infos, inputs)

    others = dict.fromkeys(" ".join((*inputs, *outputs)).split())  # in the order of the rule
    del others[BATCH]
    split.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, args, _: shardings(mesh, args, outputs),
        sharding_rule=f"{', '.join(inputs)} -> {', '.join(outputs)}",
        need_replication_factors=tuple(others),
    )
    mapped = custom_vmap(split)

    @mapped.def_vmap
    def _(axis_size, is_mapped, *args):
        in_batch = [axes.split()[0] == BATCH for axes in inputs]
        if any(m and not b for m, b in zip(is_mapped, in_batch, strict=True)):
            parts = [
                mapped(*(a[i] if m else a for a, m in zip(args, is_mapped, strict=True)))
                for i in range(axis_size)
            ]  # parameters of its own for each: one after the other
            out = tuple(jnp.stack(part) for part in zip(*parts, strict=True))
            return out, (True,) * len(out)
        merged = []
        for array, m, b in zip(args, is_mapped, in_batch, strict=True):
            if b:
                array = array if m else jnp.broadcast_to(array, (axis_size, *array.shape))
                array = array.reshape(-1, *array.shape[2:])
            merged.append(array)
        out = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in mapped(*merged))
        return out, (True,) * len(out)

    return mapped
