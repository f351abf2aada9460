"""SwiGLU's hidden width, which not every model has as GPUs want it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowdcn_jax.config import config_names, load_config
from flowdcn_jax.models import layers
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, state_sharding
from tests.comparison import relative_error

WIDTH, HIDDEN, WIDER = 112, 298, 320  # two devices split the hidden axis, four and eight the other


def swiglu(width, dtype):
    """(loss(params, x), its parameters)."""
    graphdef, state = nnx.split(layers.SwiGLU(width, dtype=dtype, rngs=nnx.Rngs(0)))

    def loss(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x).tokens.astype(jnp.float32)))

    return loss, nnx.to_pure_dict(state)


def test_of_the_papers_models_only_l_is_widened():
    widened = set()
    for name in config_names():
        model = load_config(name).model
        hidden = layers.SwiGLU.hidden_width(model.width)
        if "sit" not in name and "dit" not in name and layers.hidden_padding(hidden, jnp.bfloat16):
            widened.add(name)
    assert widened == {"l2", "cifar10_tiny", "digits", "digits_mean_flow"}
    assert layers.hidden_padding(2730, jnp.bfloat16) == 2752 - 2730
    assert layers.hidden_padding(2730, jnp.float32) == 0


@pytest.mark.parametrize("dtype, width", [("bfloat16", WIDER), ("float32", HIDDEN)])
def test_products_of_16_bits_are_wider_in_both_directions(dtype, width):
    loss, params = swiglu(WIDTH, jnp.dtype(dtype))
    x = jnp.ones((2, 3, 4, WIDTH))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    sizes = {int(size) for line in products for size in re.findall(r"(?<=[<x])\d+(?=x)", line)}
    assert len(products) == 3 * 3 and sizes == {2, 3, 4, WIDTH, width}


@pytest.mark.parametrize(
    "sizes, split",
    [((1, 1), ()), ((4, 2), (None, "fsdp")), ((2, 4), ("fsdp",)), ((1, 8), ("fsdp",))],
)
def test_wider_weights_give_the_same_outputs_and_gradients_on_any_mesh(sizes, split, monkeypatch):
    loss, params = swiglu(WIDTH, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (8, 3, 4, WIDTH))
    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    monkeypatch.setattr(layers, "hidden_padding", lambda hidden, dtype: WIDER - hidden)
    mesh = make_mesh(*sizes, jax.devices()[: sizes[0] * sizes[1]])
    shardings = (state_sharding(params, mesh), batch_sharding(mesh))
    assert shardings[0]["w1"]["kernel"].spec == jax.P(*split)
    loss, _ = swiglu(WIDTH, jnp.float32)  # traced anew
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), in_shardings=shardings)
    actual = step(params, x)
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) < 1e-6, errors
    assert jax.tree.map(np.shape, actual) == jax.tree.map(np.shape, expected)


def test_bfloat16_is_close_to_float32():
    (loss, params), (exact, _) = swiglu(WIDTH, jnp.bfloat16), swiglu(WIDTH, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (8, 3, 4, WIDTH))
    actual, expected = (jax.jit(jax.grad(f))(params, x) for f in (loss, exact))
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) < 2e-2, errors
