"""Numbers of a GPU's lanes, as they stand in a kernel, and JAX's functions of scalars on them."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


class Lanes:
    """A number or a condition of each lane: int32, float32 or bool."""

    def __init__(self, value: ir.Value):
        self.value = value

    @property
    def is_float(self) -> bool:
        return isinstance(self.value.type, ir.FloatType)

    def _with(self, other, of_floats: Callable, of_integers: Callable) -> "Lanes":
        other = _like(self, other)
        if self.is_float:
            return Lanes(of_floats(self.value, other, fastmath=_contract()))
        return Lanes(of_integers(self.value, other))

    def __add__(self, other):
        return self._with(other, arith.addf, arith.addi)

    def __sub__(self, other):
        return self._with(other, arith.subf, arith.subi)

    def __rsub__(self, other):
        return Lanes(_like(self, other)) - self

    def __mul__(self, other):
        return self._with(other, arith.mulf, arith.muli)

    def __floordiv__(self, other):
        """For integers that are not negative, like `%`, `>>` and `<`."""
        return Lanes(arith.divui(self.value, _like(self, other)))

    def __mod__(self, other):
        return Lanes(arith.remui(self.value, _like(self, other)))

    def __and__(self, other):
        return Lanes(arith.andi(self.value, _like(self, other)))

    def __or__(self, other):
        return Lanes(arith.ori(self.value, _like(self, other)))

    def __rshift__(self, other):
        return Lanes(arith.shrui(self.value, _like(self, other)))

    def __lshift__(self, other):
        return Lanes(arith.shli(self.value, _like(self, other)))

    def __lt__(self, other):
        return _compare(self, other, "OLT", "slt")

    def __eq__(self, other):
        return _compare(self, other, "OEQ", "eq")

    def __ne__(self, other):
        return _compare(self, other, "UNE", "ne")

    __hash__ = None


def _like(lanes: Lanes, number) -> ir.Value:
    if isinstance(number, Lanes):
        return number.value
    return arith.constant(lanes.value.type, float(number) if lanes.is_float else int(number))


def _contract() -> ir.Attribute:
    """Lets a product and a sum become one instruction."""
    return ir.Attribute.parse("#arith.fastmath<contract>")


def _compare(a: Lanes, b, of_floats: str, of_integers: str) -> Lanes:
    if a.is_float:
        predicate = getattr(arith.CmpFPredicate, of_floats)
        return Lanes(arith.cmpf(predicate, a.value, _like(a, b)))
    predicate = getattr(arith.CmpIPredicate, of_integers)
    return Lanes(arith.cmpi(predicate, a.value, _like(a, b)))


def type_named(name: str) -> ir.Type:
    return ir.Type.parse(name)


def assemble(text: str, result, constraints: str, *args: Lanes, ordered: bool = False):
    """PTX with one result, several (a list of types) or none; `ordered`: it keeps its place."""
    if isinstance(result, list) and len(result) == 1:
        return [assemble(text, result[0], constraints, *args, ordered=ordered)]
    several = isinstance(result, list)
    kind = llvm.StructType.get_literal(result) if several else result
    values = [x.value for x in args]
    out = llvm.inline_asm(kind, values, text, constraints, has_side_effects=ordered)
    if several:
        return [Lanes(llvm.extractvalue(t, out, [i])) for i, t in enumerate(result)]
    return None if result is None else Lanes(out)


# --- JAX scalars -> lanes ------------------------------------------------------------------------


def dtype_of(x: Lanes):
    return jnp.float32 if x.is_float else jnp.int32


def _unary(text: str) -> Callable:
    """A float32 of a float32 in one instruction."""

    def apply(x, **params):
        del params
        return assemble(text, type_named("f32"), "=f,f", x)

    return apply


def _binary(of_lanes: Callable) -> Callable:
    """`of_lanes` of two operands, one of which may be a number."""

    def apply(a, b, **params):
        del params
        if not isinstance(a, Lanes):
            a = Lanes(_like(b, a))
        return of_lanes(a, b)

    return apply


def _extremum(of_floats: str, of_integers: Callable) -> Callable:
    def apply(a, b):
        if a.is_float:
            text = f"{of_floats} $0, $1, $2;"
            return assemble(text, type_named("f32"), "=f,f,f", a, Lanes(_like(a, b)))
        return Lanes(of_integers(a.value, _like(a, b)))

    return _binary(apply)


def _select_n(condition: Lanes, if_false, if_true) -> Lanes:
    if not isinstance(if_false, Lanes):
        if isinstance(if_true, Lanes):
            if_false = Lanes(_like(if_true, if_false))
        else:
            if_false = Lanes(arith.constant(type_named("f32"), float(if_false)))
    return Lanes(arith.select(condition.value, _like(if_false, if_true), if_false.value))


def _convert(x, *, new_dtype, **params) -> Lanes:
    del params
    if not isinstance(x, Lanes):
        return jnp.dtype(new_dtype).type(x)
    to_float = jnp.issubdtype(new_dtype, jnp.floating)
    if to_float == x.is_float:
        return x
    text, kinds = ("cvt.rn.f32.s32", "=f,r") if to_float else ("cvt.rzi.s32.f32", "=r,f")
    return assemble(f"{text} $0, $1;", type_named("f32" if to_float else "i32"), kinds, x)


SCALARS = {
    "add": _binary(lambda a, b: a + b),
    "sub": _binary(lambda a, b: a - b),
    "mul": _binary(lambda a, b: a * b),
    "neg": lambda x, **_: x * -1,
    "and": _binary(lambda a, b: a & b),
    "eq": _binary(lambda a, b: a == b),
    "lt": _binary(lambda a, b: a < b),
    "ge": _binary(lambda a, b: _compare(a, b, "OGE", "sge")),
    "max": _extremum("max.NaN.f32", arith.maxsi),
    "min": _extremum("min.NaN.f32", arith.minsi),
    "abs": _unary("abs.f32 $0, $1;"),
    "square": lambda x, **_: x * x,
    "floor": _unary("cvt.rmi.f32.f32 $0, $1;"),
    "ceil": _unary("cvt.rpi.f32.f32 $0, $1;"),
    "exp2": _unary("ex2.approx.ftz.f32 $0, $1;"),
    "rsqrt": _unary("rsqrt.approx.ftz.f32 $0, $1;"),
    "select_n": _select_n,
    "convert_element_type": _convert,
}
