"""From three functions (forward, its transpose, its tangent) to one that JAX can differentiate.

The derivative along a direction is a primitive that is linear in the direction. Its lowering is
the tangent; its transpose, which is all that `jax.grad` meets, is the backward pass. So both modes
work, and `jax.grad` runs nothing of the tangent. There is no second derivative: a stand-in takes
its place, which is an error where a program needs it. A gradient of what holds a tangent does not,
if the gradient stops at the tangent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

BATCH = "b"


class Rules(NamedTuple):
    """An operator of arrays; each function is one and the same object in every call."""

    forward: Callable  # of the inputs
    backward: Callable  # (inputs, cotangent) -> cotangents of the inputs that move
    tangent: Callable  # (*inputs, *tangents of those that move) -> the output's
    # Axes of each input, such as "b h w g c". An input without "b" is shared by the whole batch.
    inputs: tuple[str, ...]
    moving: int  # so many inputs have derivatives, the first ones; the others are constants


def differentiable(rules: Rules) -> Callable:
    """The operator of `rules`, as a function of its inputs."""
    operator = jax.custom_jvp(lambda *inputs: rules.forward(*inputs))

    @operator.defjvp
    def _(inputs, tangents):
        inputs = _vary_alike(inputs)
        return operator(*inputs), _tangent_of(rules, inputs, tangents[: rules.moving])

    return operator


@jax.custom_jvp
def differentiable_no_more(arrays):
    """`arrays` as they are; differentiating what is computed from them is an error.

    The backward passes put their inputs through this, for what they do inside (kernels, bit
    patterns) would give no second derivative, or a wrong one.
    """
    return arrays


@differentiable_no_more.defjvp
def _raise(primals, tangents):
    raise NotImplementedError(_MESSAGE)


_MESSAGE = (
    "the deformable aggregation has no second derivatives: its gradient or its tangent was"
    " differentiated. jax.grad, jax.jvp, jax.linearize, and jax.grad of a loss that holds a"
    " jax.jvp work, the latter if the tangent is under jax.lax.stop_gradient"
)


# --- the derivative along a direction ------------------------------------------------------------


def _tangent_of(rules: Rules, inputs, tangents) -> jax.Array:
    """The tangent of the output at `inputs` along `tangents` (of those that move)."""
    args = _vary_alike((*inputs, *tangents))
    # As a jaxpr in a parameter, for jit to find the custom_partitioning in it.
    return _tangent_p.bind(*args, rules=rules, call=jax.make_jaxpr(rules.tangent)(*args))


def _vary_alike(arrays) -> tuple:
    """In jax.shard_map: if one array differs between devices, all do, as far as JAX knows.

    Then gradients of an array that does not are summed over the devices.
    """
    varying = [getattr(jax.typeof(x), "vma", frozenset()) for x in arrays]
    axes = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(axes - own)), to="varying") if axes - own else x
        for x, own in zip(arrays, varying, strict=True)
    )


def _run(*args, rules: Rules, call):
    del rules
    return core.jaxpr_as_fun(call)(*args)[0]


def _transpose(cotangent, *args, rules: Rules, call):
    del call
    count = len(rules.inputs)
    if type(cotangent) is ad.Zero:
        return [None] * len(args)
    inputs, cotangent = differentiable_no_more((args[:count], cotangent))
    gradients = rules.backward(inputs, cotangent)
    wanted = map(ad.is_undefined_primal, args[count:])
    return [None] * count + [g if w else None for g, w in zip(gradients, wanted, strict=True)]


def _jvp(args, dots, *, rules: Rules, call):
    count = len(rules.inputs)
    total = _run_linear(args, rules, call)
    moved, further = dots[:count], dots[count:]
    tangent = None
    if any(type(dot) is not ad.Zero for dot in further):
        tangent = _tangent_of(rules, args[:count], map(ad.instantiate_zeros, further))
    if any(type(dot) is not ad.Zero for dot in moved):
        second = _second_p.bind(*map(ad.instantiate_zeros, moved), like=call.out_avals[0])
        tangent = second if tangent is None else tangent + second
    return total, tangent


def _run_linear(args, rules: Rules, call):
    return _tangent_p.bind(*args, rules=rules, call=call)


def _batch(args, dims, *, rules: Rules, call):
    """The mapped axis joins the batch; where each has arrays of its own for all, one by one."""
    del call
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    count = len(rules.inputs)
    axes = (*rules.inputs, *rules.inputs[: rules.moving])
    in_batch = [x.split()[0] == BATCH for x in axes]
    args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
    if any(d is not None and not b for d, b in zip(dims, in_batch, strict=True)):
        parts = [
            [x if d is None else x[i] for x, d in zip(args, dims, strict=True)] for i in range(size)
        ]
        return jnp.stack([_tangent_of(rules, x[:count], x[count:]) for x in parts]), 0
    merged = []
    for x, d, b in zip(args, dims, in_batch, strict=True):
        if b:
            x = jnp.broadcast_to(x, (size, *x.shape)) if d is None else x
            x = x.reshape(-1, *x.shape[2:])
        merged.append(x)
    out = _tangent_of(rules, merged[:count], merged[count:])
    return out.reshape(size, -1, *out.shape[1:]), 0


_tangent_p = core.Primitive("deformable_aggregate_tangent")
_tangent_p.def_impl(lambda *args, **params: jax.jit(lambda *args: _run(*args, **params))(*args))
_tangent_p.def_abstract_eval(lambda *args, rules, call: call.out_avals[0])
mlir.register_lowering(_tangent_p, mlir.lower_fun(_run, multiple_results=False))
ad.primitive_jvps[_tangent_p] = _jvp
ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _batch


# --- what takes the second derivative's place ----------------------------------------------------


def _refuse(*args, **params):
    raise NotImplementedError(_MESSAGE)


def _refuse_transpose(cotangent, *args, **params):
    if type(cotangent) is ad.Zero:
        return [None] * len(args)
    return _refuse()


def _batch_second(args, dims, *, like):
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    return _second_p.bind(*args, like=like.update(shape=(size, *like.shape))), 0


def _jvp_second(args, dots, *, like):
    dots = map(ad.instantiate_zeros, dots)
    return _second_p.bind(*args, like=like), _second_p.bind(*dots, like=like)


_second_p = core.Primitive("deformable_aggregate_second_derivative")
_second_p.def_impl(_refuse)
_second_p.def_abstract_eval(lambda *args, like: like)
mlir.register_lowering(_second_p, _refuse)
ad.primitive_jvps[_second_p] = _jvp_second
ad.primitive_transposes[_second_p] = _refuse_transpose
batching.primitive_batchers[_second_p] = _batch_second
