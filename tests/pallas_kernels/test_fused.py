"""The fused kernels against their plain JAX: simulated on CPUs, and run with `-m gpu`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowdcn_jax.config import load_config
from flowdcn_jax.models import abstract_model, apply_model, layers, random_params
from pallas_kernels.fused import (
    Norm,
    operator,
    residual_adaln,
    residual_adaln_reference,
    swiglu,
    swiglu_reference,
)
from tests.pallas_kernels.aggregation import lowered_for_cuda

pytestmark = pytest.mark.usefixtures("quick_compilation")

RMS, LAYER = Norm(centred=False, epsilon=1e-6), Norm(centred=True, epsilon=1e-6)


def adaln_arrays(shape, *, bias=True, dtype=jnp.float32, seed=0):
    """(x, mixed, bias, gate, factor, shift) of random numbers."""
    draw = np.random.default_rng(seed).standard_normal
    batch, _, _, width = shape
    x, mixed = (jnp.asarray(draw(shape), dtype) for _ in range(2))
    vector = jnp.asarray(draw(width), jnp.float32) if bias else None
    return x, mixed, vector, *(jnp.asarray(draw((batch, width)), jnp.float32) for _ in range(3))


def plain_adaln(x, mixed, bias, gate, factor, shift, *, norm):
    tokens = x.shape[0], -1, x.shape[-1]
    x_flat, mixed = x.reshape(tokens), mixed.reshape(tokens)
    y, h = residual_adaln_reference(x_flat, mixed, gate, factor, shift, bias, norm=norm)
    return y.reshape(x.shape), h.reshape(x.shape)


def cotangents(outputs, seed=1):
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: jnp.asarray(draw(x.shape), x.dtype), outputs)


def outputs_and_gradients(function, *args):
    outputs, vjp = jax.vjp(function, *args)
    return outputs, vjp(cotangents(outputs))


def assert_close(found, expected, tolerance):
    """Each array to `tolerance` of the largest number of the expected one."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    "shape, norm, bias",
    [
        ((2, 5, 5, 72), RMS, True),  # a piece that hangs over, and rows past the last token
        pytest.param((1, 8, 8, 384), LAYER, False, marks=pytest.mark.slow),
        # Four warps, two pieces, a second program with few tokens.
        pytest.param((1, 9, 8, 1152), LAYER, True, marks=pytest.mark.slow),
        pytest.param((2, 1, 3, 200), LAYER, True, marks=pytest.mark.slow),
        ((2, 1, 1, 72), RMS, True),  # one token: its parts of sums are all of them
    ],
)
def test_simulated_adaln_agrees(shape, norm, bias):
    args = adaln_arrays(shape, bias=bias)
    kernel = functools.partial(residual_adaln, norm=norm, interpret=True)
    expected = outputs_and_gradients(functools.partial(plain_adaln, norm=norm), *args)
    assert_close(outputs_and_gradients(kernel, *args), expected, 2e-6)


@pytest.mark.parametrize("half", [1100, pytest.param(1024, marks=pytest.mark.slow)])
def test_simulated_swiglu_agrees(half):
    both = cotangents(jnp.zeros((3, 2, 1, 2 * half)))
    expected = outputs_and_gradients(lambda x: swiglu_reference(x)[0], both)
    found = outputs_and_gradients(functools.partial(swiglu, interpret=True), both)
    assert_close(found, expected, 2e-6)


def test_derivatives_along_a_direction():
    args = adaln_arrays((2, 2, 2, 72))
    kernel = functools.partial(residual_adaln, norm=RMS, interpret=True)
    plain = functools.partial(plain_adaln, norm=RMS)
    direction = cotangents(args)
    assert_close(jax.jvp(kernel, args, direction), jax.jvp(plain, args, direction), 2e-6)

    def loss(function, args):  # as a loss that holds a derivative of its own
        outputs, tangents = jax.jvp(function, args, direction)
        return sum(
            jnp.sum(x * jax.lax.stop_gradient(t)) for x, t in zip(outputs, tangents, strict=True)
        )

    found, expected = (jax.grad(functools.partial(loss, f))(args) for f in (kernel, plain))
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("mapped", ["tokens", pytest.param("all", marks=pytest.mark.slow)])
def test_mapped_axes_join_the_batch(mapped):
    args = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adaln_arrays((1, 2, 2, 72)))
    axes = (0,) * 6
    if mapped == "tokens":
        axes = (0, 0, None, 0, 0, 0)
        args = tuple(x if a == 0 else x[0] for x, a in zip(args, axes, strict=True))

    def gradients(function):
        each = lambda *args: outputs_and_gradients(function, *args)  # noqa: E731
        return jax.vmap(each, in_axes=axes)(*args)

    found = gradients(functools.partial(residual_adaln, norm=RMS, interpret=True))
    assert_close(found, gradients(functools.partial(plain_adaln, norm=RMS)), 2e-6)


def test_devices_take_their_images_without_communication():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    over_images, everywhere = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("data",), ()))
    args = adaln_arrays((8, 2, 2, 72))
    placed = tuple(jax.device_put(x, everywhere if x.ndim == 1 else over_images) for x in args)
    kernel = functools.partial(residual_adaln, norm=RMS, interpret=True)
    compiled = jax.jit(functools.partial(outputs_and_gradients, kernel)).lower(*placed).compile()
    found = compiled(*placed)
    assert_close(
        found, outputs_and_gradients(functools.partial(plain_adaln, norm=RMS), *args), 2e-6
    )
    text = compiled.as_text()
    assert "all-gather" not in text
    assert found[0][0].sharding.spec[0] == "data"


def test_what_the_kernels_cannot_index_is_plain_jax(monkeypatch):
    monkeypatch.setattr(operator, "MAX_ELEMENTS", 100)
    args = adaln_arrays((1, 2, 2, 72))
    # Without interpretation a kernel would fail here: there is no GPU.
    found = outputs_and_gradients(functools.partial(residual_adaln, norm=RMS), *args)
    assert_close(
        found, outputs_and_gradients(functools.partial(plain_adaln, norm=RMS), *args), 2e-6
    )


@pytest.mark.parametrize("width, norm", [(384, RMS), (768, LAYER), (1024, RMS), (1152, LAYER)])
def test_kernels_are_lowered_for_cuda(width, norm):
    args = adaln_arrays((1, 8, 8, width), dtype=jnp.bfloat16)
    kernel = functools.partial(outputs_and_gradients, functools.partial(residual_adaln, norm=norm))
    text = lowered_for_cuda(kernel, *args)
    assert "residual_adaln_backward" in text
    both = jnp.zeros((1, 2, 2, 2 * SWIGLU_HIDDEN[width]), jnp.bfloat16)
    assert "swiglu_backward" in lowered_for_cuda(
        functools.partial(outputs_and_gradients, swiglu), both
    )


SWIGLU_HIDDEN = {384: 1024, 768: 2048, 1024: 2752, 1152: 3072}


@pytest.mark.parametrize("name, products_a_block", [("s2", 5), ("sit_s2", 7)])
def test_networks_launch_them_and_multiply_jointly(name, products_a_block, monkeypatch):
    """As on a GPU: between blocks as well as within them, and in the gradient nothing else."""
    monkeypatch.setattr(layers, "takes_kernels", lambda dtype: jnp.dtype(dtype).itemsize == 2)
    config = load_config(name).model
    config.dtype, config.width, config.depth = "bfloat16", 48, 2
    graphdef, params = abstract_model(config)
    x, t, y = jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)

    def loss(params):
        return apply_model(graphdef, params, x, t, y).sum()

    forward, gradient = (lowered_for_cuda(f, params) for f in (loss, jax.grad(loss)))
    swiglus = 2 if name == "s2" else 0
    for text, backwards in ((forward, 0), (gradient, 1)):
        assert text.count('name = "residual_adaln"') == 3
        assert text.count('name = "residual_adaln_backward"') == 3 * backwards
        assert text.count('name = "swiglu"') == swiglus
        assert text.count('name = "swiglu_backward"') == swiglus * backwards
    around = 6  # the stem, two of the time, the classes, two of the last layer
    assert forward.count("dot_general") == around + 2 * products_a_block


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 16, 16, 384), (2, 16, 16, 1152), (3, 10, 7, 768)])
@pytest.mark.parametrize("norm", [RMS, LAYER])
def test_adaln_on_a_gpu(shape, norm):
    args = adaln_arrays(shape, dtype=jnp.bfloat16)
    kernel = jax.jit(
        functools.partial(outputs_and_gradients, functools.partial(residual_adaln, norm=norm))
    )
    plain = functools.partial(outputs_and_gradients, functools.partial(plain_adaln, norm=norm))
    found = kernel(*args)
    assert_close(found, plain(*args), 1e-2)
    for _ in range(9):
        jax.tree.map(np.testing.assert_array_equal, found, kernel(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("half", [1024, 2752, 3072])
def test_swiglu_on_a_gpu(half):
    both = cotangents(jnp.zeros((2, 16, 16, 2 * half), jnp.bfloat16))
    kernel = jax.jit(functools.partial(outputs_and_gradients, swiglu))
    expected = outputs_and_gradients(lambda x: swiglu_reference(x)[0], both)
    found = kernel(both)
    assert_close(found, expected, 1e-2)
    for _ in range(9):
        jax.tree.map(np.testing.assert_array_equal, found, kernel(both))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["s2", "sit_s2"])
def test_networks_are_the_same_with_and_without_kernels(name, monkeypatch):
    config = load_config(name).model
    config.dtype, config.depth = "bfloat16", 3
    graphdef, shapes = abstract_model(config)
    params = jax.tree.map(lambda x: 0.5 * x, random_params(shapes))
    draw = np.random.default_rng(0).standard_normal
    x, t = jnp.asarray(draw((4, 32, 32, 4)), jnp.float32), jnp.linspace(0.1, 0.9, 4)
    y = jnp.arange(4, dtype=jnp.int32)

    def loss(params):
        velocity = apply_model(graphdef, params, x, t, y)
        return jnp.mean(velocity**2), velocity

    def run():
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, fused), fused_gradients = run()
    monkeypatch.setattr(layers, "takes_kernels", lambda dtype: False)
    (_, plain), gradients = run()
    assert_close(fused, plain, 2e-2)
    norm = lambda tree: np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree)))  # noqa: E731
    difference = jax.tree.map(jnp.subtract, fused_gradients, gradients)
    assert norm(difference) < 3e-2 * norm(gradients)
