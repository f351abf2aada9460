"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flowdcn_jax.models import abstract_model, init_params
from flowdcn_jax.runs.optimizer import make_optimizer
from flowdcn_jax.runs.sharding import state_sharding, with_sharding


class TrainState(NamedTuple):
    """A pytree: everything that the next step depends on, and the EMAs that samples are drawn with.

    The random keys and the data position follow from the config's seed and `step`.
    """

    step: jax.Array  # int32 scalar: optimizer steps done
    params: Any  # nested dicts of float32
    opt_state: Any
    ema: Any  # like params
    other_emas: dict[str, Any] = {}  # by name, each like params; never changed in place


def abstract_state(config, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings, without any of its numbers."""
    _, params = abstract_model(config.model)
    opt_state = jax.eval_shape(make_optimizer(config).init, params)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    others = {name: params for name in config.ema.others}
    return with_sharding(TrainState(step, params, opt_state, params, others), mesh)


def initial_state(config, mesh: Mesh) -> TrainState:
    """A fresh state, made on the devices in its sharding (no device ever holds all of it)."""

    def init(key) -> TrainState:
        return _fresh_state(config, init_params(config.model, key))

    shardings = state_sharding(abstract_state(config, mesh), mesh)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))


def state_from_weights(config, mesh: Mesh, params) -> TrainState:
    """A state at step 0 with `params` for parameters and EMAs, and a fresh optimizer."""
    shardings = state_sharding(abstract_state(config, mesh), mesh)
    return jax.jit(lambda params: _fresh_state(config, params), out_shardings=shardings)(params)


def _fresh_state(config, params) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(params),
        ema=jax.tree.map(jnp.copy, params),
        other_emas={name: jax.tree.map(jnp.copy, params) for name in config.ema.others},
    )
