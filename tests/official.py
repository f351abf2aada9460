"""The authors' tiny models of the golden fixtures, as configs and parameters of this project."""

import json
from pathlib import Path

import ml_collections
import numpy as np
from flax import nnx, traverse_util
from safetensors.numpy import save_file

from flowdcn_jax.config import load_config
from flowdcn_jax.models.flowdcn import FlowDCN
from flowdcn_jax.published_weights.names import official_tensors


def build(config: ml_collections.ConfigDict, dtype) -> tuple:
    """(graphdef, parameters' shapes) of `config` with any compute dtype, float64 too."""
    options = {key: value for key, value in config.items() if key not in ("name", "dtype")}
    abstract = nnx.eval_shape(lambda: FlowDCN(**options, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.to_pure_dict(state)


def run_config(fixture: dict) -> ml_collections.ConfigDict:
    """A whole config for the tiny official model of a fixture, FlowDCN or SiT."""
    sizes = json.loads(str(fixture["config"]))
    is_sit = "num_heads" in sizes
    config = load_config("sit_s2" if is_sit else "s2")
    config.model.update(
        width=sizes["hidden_size"],
        depth=sizes["depth" if is_sit else "num_blocks"],
        num_classes=sizes["num_classes"],
        dtype="float32",
    )
    heads_or_groups = "num_heads" if is_sit else "num_groups"
    config.model[heads_or_groups] = sizes[heads_or_groups]
    config.data.image_size = 8 * fixture["x"].shape[-1]
    config.sampling.classes = ()
    return config


def model_config(fixture: dict, **overrides) -> ml_collections.ConfigDict:
    """config.model for the tiny official model of a fixture, as its authors ran it."""
    model = run_config(fixture).model
    if model.name == "flowdcn":
        model.boundary = "truncate"
    model.update(overrides)
    return model


def state_dict(fixture: dict, prefix: str = "param/") -> dict[str, np.ndarray]:
    """The fixture's arrays under `prefix` by the authors' names, in their order."""
    return {key.removeprefix(prefix): fixture[key] for key in fixture if key.startswith(prefix)}


def to_tree(fixture: dict, prefix: str = "param/") -> dict:
    """The fixture's arrays under `prefix` as this project's nested dict of parameters."""
    arrays = state_dict(fixture, prefix)
    tensors = official_tensors(model_config(fixture), tokens_per_side=8)
    return traverse_util.unflatten_dict(
        {t.path: t.to_ours(arrays[name]) for name, t in tensors.items() if t.path is not None}
    )


def nhwc(x: np.ndarray) -> np.ndarray:
    """[B,C,H,W] -> [B,H,W,C]."""
    return np.moveaxis(x, 1, -1)


def half(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As the EMA of official_tiny.ckpt: half of each parameter."""
    return {name: value / 2 for name, value in tensors.items()}


def under(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors with `prefix` before their names."""
    return {prefix + name: value for name, value in tensors.items()}


def lightning(tensors: dict[str, np.ndarray], ema: dict) -> dict[str, np.ndarray]:
    """A Lightning checkpoint, keys joined by dots; the EMA has places in the place of names."""
    places = {f"optimizer_states.0.ema.{i}": value for i, value in enumerate(ema.values())}
    moments = {"optimizer_states.0.opt.state.0.exp_avg": next(iter(tensors.values()))}
    return under("state_dict.denoiser.", tensors) | places | moments


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Writes the file and returns its path."""
    save_file(tensors, path)
    return path
