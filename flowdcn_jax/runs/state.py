"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flowdcn_jax.models import abstract_model, init_params
from flowdcn_jax.runs.sharding import state_sharding, with_sharding


class TrainState(NamedTuple):
    """A pytree: everything that the next step depends on, and the EMA that samples are drawn with.

    The random keys and the data position follow from the config's seed and `step`.
    """

    step: jax.Array  # int32 scalar: optimizer steps done
    params: Any  # nested dicts of float32
    opt_state: Any
    ema: Any  # like params


def learning_rate_schedule(config) -> optax.Schedule:
    """Linear warm-up from 0 over config.warmup_steps, then constant."""
    if config.warmup_steps == 0:
        return optax.constant_schedule(config.learning_rate)
    return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)


def make_optimizer(config) -> optax.GradientTransformation:
    """AdamW as `config` (config.optimizer) says; clipping is the train step's."""
    return optax.adamw(
        learning_rate_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


def abstract_state(config, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings, without any of its numbers."""
    _, params = abstract_model(config.model)
    opt_state = jax.eval_shape(make_optimizer(config.optimizer).init, params)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return with_sharding(TrainState(step, params, opt_state, params), mesh)


def initial_state(config, mesh: Mesh) -> TrainState:
    """A fresh state, made on the devices in its sharding (no device ever holds all of it)."""

    def init(key) -> TrainState:
        return _fresh_state(config, init_params(config.model, key))

    shardings = state_sharding(abstract_state(config, mesh), mesh)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))


def state_from_weights(config, mesh: Mesh, params) -> TrainState:
    """A state at step 0 with `params` for parameters and EMA, and a fresh optimizer."""
    shardings = state_sharding(abstract_state(config, mesh), mesh)
    return jax.jit(lambda params: _fresh_state(config, params), out_shardings=shardings)(params)


def _fresh_state(config, params) -> TrainState:
    opt_state = make_optimizer(config.optimizer).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.tree.map(jnp.copy, params))
