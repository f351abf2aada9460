"""Products of 16-bit activations with float32 parameters, whose gradients are float32 sums.

Left to itself, JAX differentiates x @ kernel.astype(bfloat16) into a gradient that is rounded to
bfloat16 before devices add theirs up. Here the derivative with respect to a parameter is a product
of 16-bit operands with float32 sums and results, whatever adds them up afterwards; or, where that
is asked for, rounded before, of float32 activations too. Everything is linear in the parameters and
in the activations, so that both modes of differentiation work.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from flowdcn_jax.precision import matmul_precision


def product(
    x: Array, kernel: Array, *, dtype=None, gradient_dtype=jnp.float32, precision=None
) -> Array:
    """x [..., n] @ kernel [n, m]; operands are of the dtype of x, sums float32.

    Args:
        x: activations.
        kernel: parameters, float32.
        dtype: of the result: that of x by default, or float32.
        precision: of the products of float32 operands; by default the highest.
        gradient_dtype: of the kernel's gradient while devices add it up: float32, or one of 16
            bits, which is half as much to send and is rounded before that.
    """
    if x.dtype == jnp.float32:
        precision = precision or matmul_precision(x.dtype)
        if gradient_dtype == jnp.float32:
            return jnp.dot(x, kernel, precision=precision)
        gradient_dtype = jnp.dtype(gradient_dtype)
        return _exact_product.bind(x, kernel, precision=precision, gradient_dtype=gradient_dtype)
    dtype = jnp.dtype(dtype or x.dtype)
    if gradient_dtype == jnp.float32:
        return _product.bind(x, kernel, dtype=dtype)
    return _multiply(x, kernel, dtype=dtype)


def convolution(x: Array, kernel: Array, *, groups: int, gradient_dtype=jnp.float32) -> Array:
    """x [B,h,w,n] convolved with kernel [k,k,n/groups,m], zero-padded, in the dtype of x.

    `gradient_dtype` as in `product`.
    """
    if x.dtype == jnp.float32 or gradient_dtype != jnp.float32:
        return _convolve(x, kernel, groups=groups, precision=matmul_precision(x.dtype))
    return _convolution.bind(x, kernel, groups=groups)


def add_bias(y: Array, bias: Array, *, gradient_dtype=jnp.float32) -> Array:
    """y [..., m] + bias [m], in the dtype of y; `gradient_dtype` as in `product`."""
    if y.dtype == gradient_dtype:
        return y + bias.astype(y.dtype)
    gradient_dtype = jnp.dtype(gradient_dtype)
    return y + _spread.bind(bias, shape=y.shape, dtype=y.dtype, gradient_dtype=gradient_dtype)


def _multiply(x: Array, kernel: Array, *, dtype) -> Array:
    return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=dtype)


def _gradient_of_x(cotangent: Array, x, kernel: Array, *, dtype) -> Array:
    del dtype
    narrow = x.aval.dtype
    return jnp.dot(cotangent.astype(narrow), kernel.astype(narrow).T)


def _gradient_of_kernel(cotangent: Array, x: Array, kernel, *, dtype) -> Array:
    del kernel, dtype
    rows = tuple(range(x.ndim - 1))
    dimensions = ((rows, rows), ((), ()))
    cotangent = cotangent.astype(x.dtype)
    return jax.lax.dot_general(x, cotangent, dimensions, preferred_element_type=jnp.float32)


def _multiply_exactly(x: Array, kernel: Array, *, precision, gradient_dtype) -> Array:
    del gradient_dtype
    return jnp.dot(x, kernel, precision=precision)


def _exact_gradient_of_x(cotangent: Array, x, kernel: Array, *, precision, gradient_dtype) -> Array:
    del x, gradient_dtype
    dimensions = (((cotangent.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(cotangent, kernel, dimensions, precision=precision)


def _rounded_gradient_of_kernel(
    cotangent: Array, x: Array, kernel, *, precision, gradient_dtype
) -> Array:
    del kernel, precision
    rows = tuple(range(x.ndim - 1))
    x, cotangent = x.astype(gradient_dtype), cotangent.astype(gradient_dtype)
    gradient = jax.lax.dot_general(
        x, cotangent, ((rows, rows), ((), ())), preferred_element_type=gradient_dtype
    )
    return gradient.astype(jnp.float32)


def _convolve(x: Array, kernel: Array, *, groups: int, precision=None) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


def _convolution_gradient_of_x(cotangent: Array, x, kernel: Array, *, groups: int) -> Array:
    (gradient,) = jax.linear_transpose(lambda x: _convolve(x, kernel, groups=groups), x.aval)(
        cotangent
    )
    return gradient


def _convolution_gradient_of_kernel(cotangent: Array, x: Array, kernel, *, groups: int) -> Array:
    # 16-bit operands are exact in TF32, in which GPUs convolve float32 unless asked for more.
    x, cotangent = x.astype(jnp.float32), cotangent.astype(jnp.float32)
    (gradient,) = jax.linear_transpose(lambda k: _convolve(x, k, groups=groups), kernel.aval)(
        cotangent
    )
    return gradient


def _spread_out(bias: Array, *, shape: tuple[int, ...], dtype, gradient_dtype) -> Array:
    del gradient_dtype
    return jnp.broadcast_to(bias.astype(dtype), shape)


def _gradient_of_bias(cotangent: Array, bias, *, shape, dtype, gradient_dtype) -> list[Array]:
    del bias, dtype
    zero, rows = jnp.zeros((), gradient_dtype), tuple(range(len(shape) - 1))
    # Unlike jnp.sum it leaves a 16-bit result narrow while devices add it up.
    total = jax.lax.reduce(cotangent.astype(gradient_dtype), zero, jax.lax.add, rows)
    return [total.astype(jnp.float32)]


def _primitive(name: str, function) -> core.Primitive:
    """What computes `function`, and is differentiated by rules of its own."""
    primitive = core.Primitive(name)
    primitive.def_impl(function)

    def abstract(*args, **options):
        shapes = [jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args]
        out = jax.eval_shape(lambda *arrays: function(*arrays, **options), *shapes)
        return jax.core.ShapedArray(out.shape, out.dtype)

    def batch(args, axes, **options):
        # Parameters that are mapped too, an ensemble's, have gradients by JAX's own rules.
        mapped = jax.vmap(lambda *arrays: function(*arrays, **options), in_axes=axes)
        return mapped(*args), 0

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    batching.primitive_batchers[primitive] = batch
    return primitive


_product = _primitive("parameter_product", _multiply)
ad.defbilinear(_product, _gradient_of_x, _gradient_of_kernel)

_exact_product = _primitive("exact_parameter_product", _multiply_exactly)
ad.defbilinear(_exact_product, _exact_gradient_of_x, _rounded_gradient_of_kernel)

_convolution = _primitive("parameter_convolution", _convolve)
ad.defbilinear(_convolution, _convolution_gradient_of_x, _convolution_gradient_of_kernel)

_spread = _primitive("parameter_spread", _spread_out)
ad.deflinear2(_spread, _gradient_of_bias)


def _batch_product(args, axes, *, dtype):
    (x, kernel), (x_axis, kernel_axis) = args, axes
    if kernel_axis is None:
        return _product.bind(jnp.moveaxis(x, x_axis, 0), kernel, dtype=dtype), 0
    return jax.vmap(lambda x, k: _multiply(x, k, dtype=dtype), in_axes=axes)(x, kernel), 0


batching.primitive_batchers[_product] = _batch_product
