"""Does a set of weights belong to the model that a config describes? In one message, if not."""

import math
import os
import re
from collections.abc import Mapping

import numpy as np

from flowdcn_jax.published_weights.errors import PublishedWeightsError
from flowdcn_jax.published_weights.names import DIRECTION_PRIOR, OfficialTensor
from flowdcn_jax.published_weights.source import StoredTensor

MAX_LISTED = 3  # tensors that a message names
CONSTANT_TOLERANCE = 1e-6  # of a table of sines that another computer rounded


def check_tensors(
    stored: Mapping[str, StoredTensor], official: Mapping[str, OfficialTensor], config
) -> None:
    """Every tensor of the source has its place, and every place a float32 tensor of its shape.

    Args:
        stored: the source's, by the authors' names.
        official: the model's.
        config: config.model.

    Raises:
        PublishedWeightsError: it names tensors with both shapes; where many do not fit, it says
            how the source's model differs from the config's.
    """
    problems = [
        f"{name} is missing from the source; expected shape {tensor.shape}"
        for name, tensor in official.items()
        if name not in stored
    ]
    for name, tensor in stored.items():
        if name not in official:
            problems.append(f"{name} of the source, of shape {tensor.shape}, is not of the model")
        elif tensor.shape != official[name].shape:
            problems.append(
                f"{name} has shape {tensor.shape} in the source; expected {official[name].shape}"
            )
    if problems:
        differences = ""
        if len(problems) > MAX_LISTED:
            differences = _other_prefix(stored, official) or _differences(stored, config)
        raise PublishedWeightsError(
            f"the source does not fit the config: {differences}{_listed(problems)}"
        )
    other = [f"{name} is {t.dtype}" for name, t in stored.items() if t.dtype != "float32"]
    if other:
        raise PublishedWeightsError(
            f"the source is not float32: {_listed(other)}. Published weights are float32; 16-bit "
            "copies have lost digits and do not give the published outputs"
        )


def check_constant(tensor: OfficialTensor, value: np.ndarray) -> None:
    """A constant of the authors' model must be the one that this project computes.

    Raises:
        PublishedWeightsError: it names the tensor and the largest difference.
    """
    difference = float(np.abs(value - tensor.constant).max())
    if not difference <= CONSTANT_TOLERANCE:
        raise PublishedWeightsError(
            f"{tensor.name} of the source differs by up to {difference:.3g} from the constant that "
            "it is in this model; the weights are of another one"
        )


def _listed(problems: list[str]) -> str:
    more = len(problems) - MAX_LISTED
    return "; ".join(problems[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _other_prefix(
    stored: Mapping[str, StoredTensor], official: Mapping[str, OfficialTensor]
) -> str:
    """What all names of the source begin with, if the model's follow it."""
    common, dot, _ = os.path.commonprefix(list(stored)).rpartition(".")
    prefix = common + dot
    if not prefix or official.keys().isdisjoint(name.removeprefix(prefix) for name in stored):
        return ""
    return f"all names of the source begin with {prefix}; expected them without it; "


def _differences(stored: Mapping[str, StoredTensor], config) -> str:
    """The keys of config.model to which the source's shapes give other values."""
    found = _model_of(stored)
    parts = [
        f"{key}={value!r} (config.model.{key} is {config[key]!r})"
        for key, value in found.items()
        if key in config and config[key] != value
    ]
    return f"it looks like a model with {', '.join(parts)}; " if parts else ""


def _model_of(stored: Mapping[str, StoredTensor]) -> dict:
    """What the shapes of the authors' tensors tell about config.model."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    found = {}
    if any(".attn.qkv." in name for name in shapes):
        found["name"] = "sit"
    if any(DIRECTION_PRIOR in name for name in shapes):
        found["name"] = "flowdcn"
    stem = shapes.get("x_embedder.proj.weight", ())
    if len(stem) == 4:
        found |= {"width": stem[0], "in_channels": stem[1], "patch_size": stem[2]}
    blocks = [match for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match]
    if blocks:
        found["depth"] = 1 + max(int(block[1]) for block in blocks)
    scales = [shape for name, shape in shapes.items() if name.endswith("deformables_scale")]
    if scales:
        found["num_groups"] = math.prod(scales[0])
    if "y_embedder.embedding_table.weight" in shapes:
        found["num_classes"] = shapes["y_embedder.embedding_table.weight"][0] - 1
    return found
