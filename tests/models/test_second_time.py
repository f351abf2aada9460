"""A network of a second time begins as the one without, and has derivatives along a direction."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax import models
from flowdcn_jax.models import sit
from flowdcn_jax.training.objective import make_objective
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOWDCN = tiny.config().model.to_dict()


def test_it_begins_with_the_same_parameters_and_function():
    model = tiny.SIT
    later = model | {"second_time": True}
    init = jax.jit(lambda key: [models.init_params(m, key) for m in (model, later)])
    before, after = init(jax.random.key(0))
    embedder = after.pop("span_embedder")
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not embedder["out"]["kernel"].any() and not embedder["out"]["bias"].any()
    shapes = jax.tree.map(jnp.shape, (before["time_embedder"], embedder))
    assert shapes[0] == shapes[1]

    # Initial velocities are zero, so of other parameters.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), before)
    graphdefs = [models.abstract_model(m)[0] for m in (model, later)]
    inputs = jnp.ones((2, 8, 8, 1)), jnp.array([0.2, 0.7]), jnp.array([1, 10])
    other = jax.tree.map(jnp.ones_like, embedder)
    velocity, jump, learnt = jax.jit(
        lambda params: [
            models.apply_model(graphdefs[0], params, *inputs),
            *(
                models.apply_model(
                    graphdefs[1], params | {"span_embedder": e}, *inputs, r=jnp.ones(2)
                )
                for e in (embedder, other)
            ),
        ]
    )(params)
    np.testing.assert_array_equal(jump, velocity)
    assert np.abs(learnt - velocity).max() > 1e-3
    with pytest.raises(ValueError, match="r is given; expected none, since the model has no sec"):
        models.apply_model(graphdefs[0], params, *inputs, r=inputs[1])
    with pytest.raises(ValueError, match=r"r has shape \(3,\); expected that of t, \(2,\)"):
        models.apply_model(
            graphdefs[1], params | {"span_embedder": embedder}, *inputs, r=jnp.ones(3)
        )


def test_a_sit_is_differentiated_through_xlas_attention_and_trains_through_cudnns(monkeypatch):
    """On a GPU in 16 bits; here something without such a derivative stands for cuDNN's."""
    seen, attention = [], jax.nn.dot_product_attention

    def fake(query, key, value, *, implementation):
        seen.append(implementation)
        xla = functools.partial(attention, implementation="xla")
        if implementation == "xla":
            return xla(query, key, value)
        fused = jax.custom_vjp(xla)
        fused.defvjp(lambda *args: jax.vjp(xla, *args), lambda vjp, g: vjp(g))
        return fused(query, key, value)

    monkeypatch.setattr(sit, "attention_implementation", lambda *_: "cudnn")
    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    config = tiny.config(model=tiny.SIT | {"second_time": True}, flow__objective="mean_flow")
    objective, image = make_objective(config), (16, 8, 8, 1)

    def gradient(params):
        draws = objective.draw(jax.random.key(0), image)
        of_loss = jax.grad(objective.loss, has_aux=True)
        return of_loss(params, jnp.zeros(image), jnp.zeros(16, int), draws)

    jax.eval_shape(gradient, models.abstract_model(config.model)[1])
    assert seen == ["cudnn", "xla", "cudnn"]  # rows of r = t, the derivative, the others
    assert json.dumps(models.differentiable_along(FLOWDCN)) == json.dumps(FLOWDCN)


def test_the_derivative_has_a_dtype_of_its_own():
    def text(dtype):
        config = tiny.config(model=tiny.SIT | {"second_time": True}, flow__objective="mean_flow")
        config.flow.mean_flow.derivative_dtype = dtype
        objective, image = make_objective(config), (16, 8, 8, 1)

        def of_loss(params):
            drawn = objective.draw(jax.random.key(0), image)
            return objective.loss(params, jnp.zeros(image), jnp.zeros(16, int), drawn)

        return str(jax.make_jaxpr(of_loss)(models.abstract_model(config.model)[1]))

    assert "bf16" not in text("model") and "bf16" in text("bfloat16")
