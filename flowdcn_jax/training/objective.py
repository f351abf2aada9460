"""What a step minimises, by the config's name for it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from flowdcn_jax.flow import loss, mean_flow
from flowdcn_jax.models import abstract_model, apply_model, differentiable_along


class Objective(NamedTuple):
    """A loss, and the randomness that it needs."""

    draw: Callable[..., Any]  # (key, shape of the data) -> draws, an entry a row
    # (params, data, label, draws) -> (loss, more metrics by name), scalars
    loss: Callable[..., Any]
    group: int = 1  # adjacent rows that a part of a batch keeps together
    forward_passes: float = 3  # what a step costs an image; a gradient costs two


def make_objective(config) -> Objective:
    """config.flow.objective, of config.model."""
    return OBJECTIVES[config.flow.objective](config)


def _velocity(config) -> Objective:
    """Flow matching: the mean squared error of the velocity."""
    graphdef, _ = abstract_model(config.model)

    def velocity_loss(*args):
        of_network = functools.partial(apply_model, graphdef)
        null_class = config.model.num_classes
        return loss.velocity_loss(*args, velocity_fn=of_network, null_class=null_class), {}

    draw = functools.partial(
        loss.draw,
        time_distribution=config.flow.time_distribution,
        label_dropout=config.flow.label_dropout,
    )
    return Objective(draw, velocity_loss)


def _mean_flow(config) -> Objective:
    """MeanFlow: see `flow.mean_flow`."""
    options, model = config.flow.mean_flow, dict(config.model)
    differentiable = differentiable_along(model)
    if options.derivative_dtype != "model":
        differentiable["dtype"] = options.derivative_dtype
    network = _of_two_times(model)
    return Objective(
        draw=functools.partial(
            mean_flow.draw, label_dropout=config.flow.label_dropout, options=options
        ),
        loss=functools.partial(
            mean_flow.mean_flow_loss,
            network=network,
            derivative_network=network
            if differentiable == model
            else _of_two_times(differentiable),
            null_class=config.model.num_classes,
            options=options,
        ),
        group=mean_flow.find_group(options.equal_share).size,
        forward_passes=mean_flow.forward_passes(options),
    )


def _of_two_times(model_config) -> Callable:
    """(params, x, t, y, r) -> mean velocity."""
    graphdef, _ = abstract_model(model_config)
    return lambda params, x, t, y, r: apply_model(graphdef, params, x, t, y, r=r)


OBJECTIVES = {"velocity": _velocity, "mean_flow": _mean_flow}
