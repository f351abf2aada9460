"""Velocity networks, built by name from `config.model`."""

import functools
from typing import NamedTuple

import jax
from flax import nnx

from flowdcn_jax.errors import ConfigError
from flowdcn_jax.models.flowcnn import FlowCNN, FlowCNNOptions
from flowdcn_jax.models.flowdcn import FlowDCN, FlowDCNOptions
from flowdcn_jax.models.sit import SiT, SiTOptions
from flowdcn_jax.models.velocity_network import NetworkOptions, VelocityNetwork
from flowdcn_jax.options import options_of


class Model(NamedTuple):
    """A network, and the keys of config.model that it has beside `name`."""

    network: type[VelocityNetwork]
    options: type[NetworkOptions]


MODELS = {
    "flowdcn": Model(FlowDCN, FlowDCNOptions),
    "flowcnn": Model(FlowCNN, FlowCNNOptions),
    "sit": Model(SiT, SiTOptions),
}


def find_model(name: str) -> Model:
    """MODELS[name].

    Raises:
        flowdcn_jax.errors.ConfigError: there is none; the message lists those there are.
    """
    if name not in MODELS:
        raise ConfigError(
            f"config.model.name is {name!r}; expected one of {', '.join(sorted(MODELS))}"
        )
    return MODELS[name]


def read_options(config) -> NetworkOptions:
    """`config` (config.model) as the options of the model that it names.

    An option that it lacks is the published model's: it was saved before the option was there.

    Raises:
        flowdcn_jax.errors.ConfigError: an unknown model, a key that the model does not have, or a
            value that does not fit.
    """
    kind = find_model(config["name"]).options
    values = {key: value for key, value in config.items() if key != "name"}
    known = options_of(kind)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"config.model.{key} is {value!r}; expected no such key, for the model "
                f"{config['name']!r} has {', '.join(sorted(known))}. Start from one of its own "
                "configs"
            )
    return kind(**values)


def build_model(config, *, rngs: nnx.Rngs) -> VelocityNetwork:
    """The module that `config` (config.model) describes, called as model(x, t, y) -> velocity.

    Raises:
        flowdcn_jax.errors.ConfigError: see `read_options`.
    """
    return find_model(config["name"]).network(read_options(config), rngs=rngs)


def abstract_model(config):
    """(graphdef, params): the structure of the model, and its parameters as ShapeDtypeStructs.

    Parameters travel through the project as plain nested dicts; `apply_model` puts them back.
    """
    graphdef, state = nnx.split(_shapes_only(config["name"], read_options(config)))
    return graphdef, nnx.to_pure_dict(state)


def init_params(config, key: jax.Array) -> dict:
    """Initial parameters of the model, as nested dicts of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(build_model(config, rngs=nnx.Rngs(key))))


def random_params(shapes):
    """Random parameters of about a trained model's size, for the `shapes` of `abstract_model`.

    With initial values the sampling points of FlowDCN would all lie on one regular grid.
    """
    leaves, structure = jax.tree.flatten(shapes)

    def draw(index, leaf):
        deviation = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 1.0
        key = jax.random.fold_in(jax.random.key(0), index)
        return deviation * jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.tree.unflatten(structure, [draw(*pair) for pair in enumerate(leaves)])


def apply_model(graphdef, params: dict, x, t, y, max_scale_factor=None, r=None) -> jax.Array:
    """model(x, t, y) for parameters held as nested dicts.

    max_scale_factor [depth,2] is for models with deformable blocks: `takes_max_scale_factor`; r [B]
    for those of a second time: `takes_second_time`.
    """
    model = nnx.merge(graphdef, params)
    factor = () if max_scale_factor is None else (max_scale_factor,)
    return model(x, t, y, *factor, **({} if r is None else {"r": r}))


def takes_max_scale_factor(config) -> bool:
    """Whether the model has deformable blocks, whose reach can be changed when it is called."""
    return find_model(config["name"]).network.takes_max_scale_factor


def takes_second_time(config) -> bool:
    """Whether the model gives mean velocities, up to a second time; also of configs saved before
    there were such models."""
    return read_options(config).second_time


def differentiable_along(config):
    """`config` (config.model) of a network of the same function that `jax.jvp` can differentiate.

    Fused attention has no such derivative; a SiT's becomes XLA's.
    """
    has_attention = "attention" in options_of(find_model(config["name"]).options)
    return dict(config) | ({"attention": "xla"} if has_attention else {})


def parameter_count(params) -> int:
    """Numbers that training changes, in `params` or in the shapes of `abstract_model`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_macs(config, height: int, width: int) -> int:
    """Multiply-adds of one forward pass over a height x width input (latent pixels)."""
    return _shapes_only(config["name"], read_options(config)).forward_macs(height, width)


@functools.cache  # seconds for XL/2, and a start of training asks several times
def _shapes_only(name: str, options: NetworkOptions) -> VelocityNetwork:
    network = find_model(name).network
    return nnx.eval_shape(lambda: network(options, rngs=nnx.Rngs(0)))
