"""Derivatives along a direction of the whole network, and gradients of a loss that holds one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flowdcn_jax.models import apply_model, layers, random_params
from pallas_kernels.deformable_conv import api
from pallas_kernels.deformable_conv.reference import deformable_aggregate_reference
from tests import official, tiny
from tests.comparison import relative_error
from tests.models.aggregates import use_aggregate
from tests.pallas_kernels.aggregation import lowered_for_an_h100, replace_in_pallas

pytestmark = pytest.mark.usefixtures("quick_compilation")


def network(dtype=jnp.float32, **options):
    """(a function of (params, x, t, y), params, x, t, y) of a tiny FlowDCN."""
    config = tiny.config(**options).model
    graphdef, shapes = official.build(config, dtype)
    params = jax.tree.map(lambda x: 0.5 * x, random_params(shapes))
    draw = np.random.default_rng(0).standard_normal
    x = jnp.asarray(draw((8, 8, 8, config.in_channels)), jnp.float32)
    t, y = jnp.linspace(0.1, 0.9, 8), jnp.arange(8, dtype=jnp.int32)
    return functools.partial(apply_model, graphdef), params, x, t, y


def loss(apply, params, x, t, y):
    """The target holds the derivative along the path."""
    velocity = jnp.roll(x, 1, axis=0) - x
    u, tangent = jax.jvp(lambda x, t: apply(params, x, t, y), (x, t), (velocity, jnp.ones_like(t)))
    return jnp.mean((u - jax.lax.stop_gradient(velocity + 0.3 * tangent)) ** 2)


@pytest.mark.slow
def test_is_a_finite_difference():
    apply, params, x, t, y = network()
    d_x, d_t = jnp.roll(x, 1, axis=0), jnp.ones_like(t)

    @jax.jit
    def moved(step):
        return apply(params, x + step * d_x, t + step * d_t, y)

    _, actual = jax.jvp(moved, (0.0,), (1.0,))
    step = 1e-4  # further on, points pass whole tokens
    difference = (np.float64(moved(step)) - np.float64(moved(-step))) / (2 * step)
    assert relative_error(actual, difference) < 2e-3  # of which float32 is the cause


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_a_loss_that_holds_a_tangent(remat, monkeypatch):
    """On eight devices, and as by automatic differentiation of the definition."""
    apply, params, x, t, y = network(model__remat=remat)
    gradient = lambda *args: jax.value_and_grad(functools.partial(loss, apply))(*args)  # noqa: E731
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(lambda *args: gradient(*args))(params, *jax.device_put((x, t, y), rows))
    use_aggregate(monkeypatch, deformable_aggregate_reference)
    expected = jax.jit(lambda *args: gradient(*args))(params, x, t, y)
    for a, b in zip(*map(jax.tree.leaves, (sharded, expected)), strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.slow
def test_on_a_gpu_it_runs_kernels_alone(monkeypatch):
    replace_in_pallas(monkeypatch, is_hopper=lambda: True)
    monkeypatch.setattr(api, "why_not_pallas", lambda: None)
    monkeypatch.setattr(layers, "takes_kernels", lambda dtype: jnp.dtype(dtype).itemsize == 2)
    apply, params, x, t, y = network(jnp.bfloat16, model__width=128)
    text = lowered_for_an_h100(jax.grad(functools.partial(loss, apply)), params, x, t, y)
    kernels = "deformable_forward", "deformable_tangent", "deformable_point_gradients"
    for kernel in (*kernels, "residual_adaln_backward", "swiglu_backward"):
        assert kernel in text
    assert "stablehlo.gather" not in text
