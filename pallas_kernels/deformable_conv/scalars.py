"""Functions of JAX scalars on other kinds of numbers: a warp's lanes, arrays that simulate them."""

from collections.abc import Callable

import jax
from jax.extend.core import Literal


def evaluate(function: Callable, args, table: dict[str, Callable], dtype_of: Callable):
    """function(*args) by the functions of `table`, one for each of JAX's primitives it uses.

    dtype_of(x) is the dtype of a number among `args`.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), dtype_of(x)), args)
    jaxpr, out_shapes = jax.make_jaxpr(function, return_shape=True)(*shapes)
    out = _evaluate_jaxpr(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(args), table)
    return jax.tree.unflatten(jax.tree.structure(out_shapes), out)


def _evaluate_jaxpr(jaxpr, consts, args, table) -> list:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr")
        if inner is not None:
            outputs = _evaluate_jaxpr(inner.jaxpr, inner.consts, inputs, table)
        else:
            outputs = [table[equation.primitive.name](*inputs, **equation.params)]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
