"""The optimizer: the learning rate of each step, AdamW or Muon, and which parameters decay."""

from collections.abc import Callable
from typing import Any

import jax
import optax

MUON_RMS = 0.2  # of an update, as AdamW's: so its learning rates serve (arXiv 2502.16982, 2.2)

# What follows the warm-up: (learning rate, final one, steps left) -> its schedule.
SCHEDULES = {
    "constant": lambda rate, final, steps: optax.constant_schedule(rate),
    "cosine": lambda rate, final, steps: optax.cosine_decay_schedule(rate, steps, final / rate),
    "linear": lambda rate, final, steps: optax.linear_schedule(rate, final, steps),
}


def learning_rate_schedule(config) -> optax.Schedule:
    """Steps done -> learning rate: linear from 0 in warm-up, then as config.optimizer.schedule.

    The final value is reached when config.train.num_steps are done.
    """
    options = config.optimizer
    rate, warmup = options.learning_rate, options.warmup_steps
    steps = max(1, config.train.num_steps - warmup)
    schedule = SCHEDULES[options.schedule](rate, options.final_learning_rate, steps)
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), schedule], [warmup])


def make_optimizer(config) -> optax.GradientTransformation:
    """AdamW or Muon as config.optimizer says; clipping is the train step's."""
    options = config.optimizer
    return optax.chain(
        OPTIMIZERS[options.name](options),
        _decayed_weights(options.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )


def decays(params) -> Any:
    """Which of `params` (or of their shapes) weight decay acts on: a tree of bools.

    The kernels of linear layers and convolutions; not biases, norms' scales, the classes' embedding
    and scale priors.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def orthogonalised(params) -> Any:
    """Which of `params` (or of their shapes) Muon makes steps of: a tree of bools.

    The matrices of the blocks. What reads patches, times and classes, and what writes velocities,
    is left to Adam, as Muon's author advises; and so are convolutions.
    """

    def rule(path, leaf) -> bool:
        return path[0].key == "blocks" and path[-1].key == "kernel" and leaf.ndim == 2

    return jax.tree_util.tree_map_with_path(rule, params)


def _adam(options) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.epsilon)


def _muon(options) -> optax.GradientTransformation:
    def dimensions(params):
        numbers = optax.contrib.MuonDimensionNumbers()
        return jax.tree.map(lambda chosen: numbers if chosen else None, orthogonalised(params))

    return optax.contrib.muon(
        -1.0,  # against the descent: a direction, as _adam's; decay and learning rate come after it
        adam_b1=options.b1,
        adam_b2=options.b2,
        eps=options.epsilon,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=MUON_RMS,
    )


# config.optimizer -> what makes directions of gradients.
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adamw": _adam,
    "muon": _muon,
}


def _decayed_weights(weight_decay: float) -> optax.GradientTransformation:
    """optax.add_decayed_weights of `decays`, whose mask would be a state that saved runs lack."""

    def add(updates, params):
        return jax.tree.map(
            lambda update, param, chosen: update + weight_decay * param if chosen else update,
            updates,
            params,
            decays(params),
        )

    return optax.stateless(add)
