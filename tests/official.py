"""The authors' parameter names, for the tests that hold the models against golden fixtures."""

import json

import ml_collections
import numpy as np
from flax import nnx

from flowdcn_jax.models.flowdcn import FlowDCN

BLOCK = {
    "norm1.weight": ("norm1", "scale"),
    "norm2.weight": ("norm2", "scale"),
    "attn.deformables_scale": ("conv", "scale_prior"),
    "attn.v": ("conv", "values"),
    "attn.qk_deformables": ("conv", "directions"),
    "attn.qk_scales": ("conv", "scales"),
    "attn.qk_weights": ("conv", "weights"),
    "attn.out": ("conv", "out"),
    "mlp.w1": ("mlp", "w1"),
    "mlp.w2": ("mlp", "w2"),
    "mlp.w3": ("mlp", "w3"),
    "adaLN_modulation.1": ("modulation",),
}
TOP = {
    "t_embedder.mlp.0": ("time_embedder", "hidden"),
    "t_embedder.mlp.2": ("time_embedder", "out"),
    "y_embedder.embedding_table.weight": ("class_embedder", "embedding"),
    "final_layer.linear": ("final", "linear"),
    "final_layer.adaLN_modulation.1": ("final", "modulation"),
}


def build(config: ml_collections.ConfigDict, dtype) -> tuple:
    """(graphdef, parameters' shapes) of `config` with any compute dtype, float64 too."""
    options = {key: value for key, value in config.items() if key not in ("name", "dtype")}
    abstract = nnx.eval_shape(lambda: FlowDCN(**options, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.to_pure_dict(state)


def model_config(fixture: dict) -> ml_collections.ConfigDict:
    """config.model for the tiny official model of a fixture."""
    config = json.loads(str(fixture["config"]))
    return ml_collections.ConfigDict(
        dict(
            name="flowdcn",
            width=config["hidden_size"],
            depth=config["num_blocks"],
            num_groups=config["num_groups"],
            patch_size=config["patch_size"],
            in_channels=config["in_channels"],
            num_classes=config["num_classes"],
            learn_sigma=config["learn_sigma"],
            boundary="truncate",
            max_scale=6.0,
            dtype="float32",
            remat=False,
        )
    )


def to_tree(fixture: dict, prefix: str = "param/") -> dict:
    """The fixture's arrays under `prefix` as this project's nested dict of parameters."""
    tree: dict = {}
    for key, value in fixture.items():
        if key.startswith(prefix) and not key.endswith("deformables_prior"):
            path, array = _convert(key.removeprefix(prefix), value)
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = array
    return tree


def _convert(name: str, value: np.ndarray) -> tuple[tuple, np.ndarray]:
    if name.startswith("x_embedder.proj"):
        if name.endswith("bias"):
            return ("stem", "bias"), value
        return ("stem", "kernel"), value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        prefix, table = ("blocks", int(number)), BLOCK
    else:
        prefix, rest, table = (), name, TOP
    if rest in table:
        return prefix + table[rest], value.reshape(-1) if "deformables_scale" in rest else value
    layer, kind = rest.rsplit(".", 1)
    if kind == "weight":
        return prefix + table[layer] + ("kernel",), value.T
    return prefix + table[layer] + ("bias",), value


def nhwc(x: np.ndarray) -> np.ndarray:
    """[B,C,H,W] -> [B,H,W,C]."""
    return np.moveaxis(x, 1, -1)
