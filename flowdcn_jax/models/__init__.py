"""Velocity networks, built by name from `config.model`."""

import inspect

import jax
from flax import nnx

from flowdcn_jax.models import layers
from flowdcn_jax.models.flowcnn import FlowCNN
from flowdcn_jax.models.flowdcn import FlowDCN, MultiscaleDeformableConv
from flowdcn_jax.models.sit import SiT
from flowdcn_jax.precision import compute_dtype

MODELS = {"flowdcn": FlowDCN, "flowcnn": FlowCNN, "sit": SiT}


def model_options(name: str) -> dict:
    """The keys of config.model for the model `name` -> its default; None where it has none.

    A default is the published model, for configs saved before the option was there.

    Raises:
        ValueError: `name` is not a known model.
    """
    constructor = layers.choose("config.model.name", name, MODELS).__init__
    return {"name": None} | {
        key: None if parameter.default is parameter.empty else parameter.default
        for key, parameter in inspect.signature(constructor).parameters.items()
        if key not in ("self", "rngs")
    }


def build_model(config, *, rngs: nnx.Rngs) -> nnx.Module:
    """The module that `config` (config.model) describes, called as model(x, t, y) -> velocity.

    Raises:
        ValueError: `config.name` is not a known model.
    """
    make_model = layers.choose("config.model.name", config.name, MODELS)
    options = {key: value for key, value in config.items() if key not in ("name", "dtype")}
    return make_model(**options, dtype=compute_dtype(config.dtype), rngs=rngs)


def abstract_model(config):
    """(graphdef, params): the structure of the model, and its parameters as ShapeDtypeStructs.

    Parameters travel through the project as plain nested dicts; `apply_model` puts them back.
    """
    graphdef, state = nnx.split(_shapes_only(config))
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


def apply_model(graphdef, params: dict, x, t, y, max_scale_factor=None) -> jax.Array:
    """model(x, t, y) for parameters held as nested dicts.

    max_scale_factor [depth,2] is for models with deformable blocks: `takes_max_scale_factor`.
    """
    model = nnx.merge(graphdef, params)
    if max_scale_factor is None:
        return model(x, t, y)
    return model(x, t, y, max_scale_factor)


def takes_max_scale_factor(config) -> bool:
    """Whether the model has deformable blocks, whose reach can be changed when it is called."""
    modules = (module for _, module in nnx.iter_modules(_shapes_only(config)))
    return any(isinstance(module, MultiscaleDeformableConv) for module in modules)


def parameter_count(params) -> int:
    """Numbers that training changes, in `params` or in the shapes of `abstract_model`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_macs(config, height: int, width: int) -> int:
    """Multiply-adds of one forward pass over a height x width input (latent pixels)."""
    return _shapes_only(config).forward_macs(height, width)


def _shapes_only(config) -> nnx.Module:
    return nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
