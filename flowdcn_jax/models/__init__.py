"""Velocity networks, built by name from `config.model`."""

import jax
import jax.numpy as jnp
from flax import nnx

from flowdcn_jax.models.flowdcn import FlowDCN, MultiscaleDeformableConv

MODELS = {"flowdcn": FlowDCN}


def compute_dtype(name: str):
    """The compute dtype that a config's "auto", "float32" or "bfloat16" stands for.

    "auto" is bfloat16 on accelerators and float32 on CPUs, which have no fast bfloat16.
    """
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def build_model(config, *, rngs: nnx.Rngs) -> nnx.Module:
    """The module that `config` (config.model) describes, called as model(x, t, y) -> velocity.

    Raises:
        ValueError: `config.name` is not a known model.
    """
    if config.name not in MODELS:
        raise ValueError(f"config.model.name is {config.name!r}; known models: {sorted(MODELS)}")
    options = {key: value for key, value in config.items() if key not in ("name", "dtype")}
    return MODELS[config.name](**options, dtype=compute_dtype(config.dtype), rngs=rngs)


def abstract_model(config):
    """(graphdef, params): the structure of the model, and its parameters as ShapeDtypeStructs.

    Parameters travel through the project as plain nested dicts; `apply_model` puts them back.
    """
    graphdef, state = nnx.split(_shapes_only(config))
    return graphdef, nnx.to_pure_dict(state)


def init_params(config, key: jax.Array) -> dict:
    """Initial parameters of the model, as nested dicts of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(build_model(config, rngs=nnx.Rngs(key))))


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


def forward_macs(config, height: int, width: int) -> int:
    """Multiply-adds of one forward pass over a height x width input (latent pixels)."""
    return _shapes_only(config).forward_macs(height, width)


def _shapes_only(config) -> nnx.Module:
    return nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
