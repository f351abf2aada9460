"""One optimizer step, compiled over the mesh."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowdcn_jax import ema
from flowdcn_jax.autoencoders import to_unit_range
from flowdcn_jax.runs.optimizer import learning_rate_schedule, make_optimizer
from flowdcn_jax.runs.sharding import AXES, batch_sharding, replicated, state_sharding
from flowdcn_jax.runs.state import TrainState, abstract_state
from flowdcn_jax.training.objective import make_objective

STEP_KEY_SALT = 1  # keeps the steps' draws apart from the initial values' key


def make_train_step(config, mesh: Mesh):
    """A compiled-on-first-use function (state, batch) -> (state, metrics); the state is donated.

    batch: {"image": [B,H,W,C] uint8 pixels or float32 latents, "label": [B] int32}, split over all
    devices. metrics: float32 scalars "loss", "grad_norm", "learning_rate" and what the objective
    adds, left on the device.
    """
    objective = make_objective(config)
    optimizer = make_optimizer(config)
    schedule = learning_rate_schedule(config)
    averages = ema.averages(config.ema)
    shardings = state_sharding(abstract_state(config, mesh), mesh)
    batch_keys = jax.random.fold_in(jax.random.key(config.seed), STEP_KEY_SALT)
    value_and_grad = jax.value_and_grad(objective.loss, has_aux=True)

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        data = to_unit_range(batch["image"])
        draws = objective.draw(jax.random.fold_in(batch_keys, state.step), data.shape)
        rows, num_parts = (data, batch["label"], draws), config.train.accumulation_steps
        if num_parts == 1:
            (loss, more), grads = value_and_grad(state.params, *rows)
        else:
            (loss, more), grads = accumulate(
                value_and_grad, state.params, rows, num_parts, mesh, group=objective.group
            )
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        grad_norm = optax.tree.norm(grads)
        if config.optimizer.clip_norm is not None:
            factor = jnp.minimum(1.0, config.optimizer.clip_norm / (grad_norm + 1e-6))
            grads = jax.tree.map(lambda g: g * factor, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def averaged(name: str, old):
            share = ema.share(averages[name], state.step, warmup=config.ema.warmup)
            return optax.incremental_update(params, old, share)

        emas = {name: averaged(name, old) for name, old in state.other_emas.items()}
        metrics = more | {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        new_state = TrainState(
            state.step + 1, params, opt_state, averaged(ema.MAIN, state.ema), emas
        )
        return new_state, metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def accumulate(value_and_grad, params, rows, num_parts: int, mesh: Mesh, *, group: int = 1):
    """value_and_grad(params, *rows) of the whole batch, taken in num_parts parts.

    The parts interleave (part i holds the groups of adjacent rows i, i + num_parts, ...), so that
    each device keeps the rows it has.
    """
    split = NamedSharding(mesh, PartitionSpec(None, AXES))

    def to_parts(x):
        size = x.shape[0] // num_parts
        x = x.reshape(size // group, num_parts, group, *x.shape[1:])
        x = jnp.swapaxes(x, 0, 1).reshape(num_parts, size, *x.shape[3:])
        return jax.lax.with_sharding_constraint(x, split)

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(value_and_grad, params, *rows))
    total, _ = jax.lax.scan(add_part, zeros, jax.tree.map(to_parts, rows))
    return jax.tree.map(lambda x: x / num_parts, total)
