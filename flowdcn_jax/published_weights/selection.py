"""Which set of weights of a file, and whether it belongs to the model that a config describes."""

import logging
import math
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from flowdcn_jax.published_weights.names import DIRECTION_PRIOR, OfficialTensor
from flowdcn_jax.published_weights.weights_file import (
    PublishedWeightsError,
    StoredTensor,
    WeightsFile,
)

LIGHTNING_STATE = "state_dict."
LIGHTNING_EMA = "optimizer_states.0.ema."
LIGHTNING_PREFIX = "denoiser."
SIT_SETS = {"ema": "ema.", "model": "model."}
MAX_LISTED = 3  # tensors that a message names
CONSTANT_TOLERANCE = 1e-6  # of a table of sines that another computer rounded


class WeightSet(NamedTuple):
    """One set of weights of a file, by the authors' names."""

    format: str  # what the file is
    which: str  # ema or model; only: the file holds no other
    tensors: dict[str, StoredTensor]
    unused: dict[str, StoredTensor]  # the EMA list's values of constants


def select_weights(
    file: WeightsFile, which: str, official: Mapping[str, OfficialTensor]
) -> WeightSet:
    """One of the sets of weights in a file, of which nothing is read yet.

    A file with one set has neither "ema" nor "model": that one is taken.

    Args:
        which: "ema" or "model".
        official: the tensors of the model, in the order of the authors' `parameters()`.

    Raises:
        PublishedWeightsError: the file has not that set, its nameless EMA list does not go with its
            state dict, or it has a tensor twice.
    """
    tensors = file.tensors
    state = _below(tensors, LIGHTNING_STATE)
    if state:
        state = _without_prefix(state)
        unused: dict[str, StoredTensor] = {}
        if which == "ema":
            state, unused = _name_ema(file, state, official)
        return WeightSet("Lightning checkpoint", which, state, unused)
    bare = _without_prefix(tensors)
    sets = {name: _below(tensors, prefix) for name, prefix in SIT_SETS.items()}
    if any(sets.values()) and bare.keys().isdisjoint(official):
        if not sets[which]:
            (only,) = (name for name in sets if sets[name])
            raise PublishedWeightsError(
                f"the source holds one set of weights, {SIT_SETS[only]}*; --weights={only} takes it"
            )
        return WeightSet("SiT checkpoint", which, sets[which], {})
    return WeightSet("state dict", "only", bare, {})


def warn_of_unused(weights: WeightSet) -> None:
    """Warns if the EMA list has other values for constants than the model has."""
    moved = [
        name
        for name, tensor in weights.unused.items()
        if not np.array_equal(tensor.read(), weights.tensors[name].read())
    ]
    if moved:
        logging.warning(
            "the EMA list has other values for constants, such as %s; those of the state dict, "
            "with which the model was trained, are used",
            moved[0],
        )


def _name_ema(
    file: WeightsFile,
    state: Mapping[str, StoredTensor],
    official: Mapping[str, OfficialTensor],
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The nameless EMA list, named by the order of `parameters()`: that of the state dict.

    Safetensors files keep no order, so there the official one stands in for it. Constants come from
    the state dict: they were never trained, so there is no average of them to take. Those of the
    list are the second result.
    """
    ema = _below(file.tensors, LIGHTNING_EMA)
    if not ema:
        raise PublishedWeightsError(
            f"the source holds one set of weights, {LIGHTNING_STATE}*, and no EMA "
            f"({LIGHTNING_EMA}*); --weights=model takes it"
        )
    odd = sorted(ema.keys() - {str(place) for place in range(len(ema))})
    if odd:
        raise PublishedWeightsError(
            f"the source's EMA has a tensor {odd[0]!r} among its {len(ema)}; expected a list, "
            f"whose tensors are 0 to {len(ema) - 1}"
        )
    names = list(state)
    if file.kind == "safetensors":
        names = [name for name in official if name in state] + sorted(
            state.keys() - official.keys()
        )
    if len(ema) != len(names):
        raise PublishedWeightsError(
            f"the source's EMA list has {len(ema)} tensors and its state dict {len(names)}; "
            "expected as many, in the same order"
        )
    named = {name: ema[str(place)] for place, name in enumerate(names)}
    for place, (name, tensor) in enumerate(named.items()):
        if tensor.shape != state[name].shape:
            raise PublishedWeightsError(
                f"tensor {place} of the source's EMA list has shape {tensor.shape}; expected "
                f"{state[name].shape}, as {name} has, which is at that place of the state dict"
            )
    constants = [name for name in named if name in official and official[name].path is None]
    unused = {name: named[name] for name in constants}
    return named | {name: state[name] for name in constants}, unused


def _below(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _without_prefix(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by their names without LIGHTNING_PREFIX, which some files have."""
    bare: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(LIGHTNING_PREFIX)
        if short in bare:
            raise PublishedWeightsError(
                f"the source holds {short} twice, with the prefix {LIGHTNING_PREFIX} and without"
            )
        bare[short] = tensor
    return bare


def check_tensors(
    stored: Mapping[str, StoredTensor],
    official: Mapping[str, OfficialTensor],
    config,
    *,
    dtype: str = "float32",
) -> None:
    """Every tensor of the source has its place, and every place a tensor of its shape and dtype.

    Args:
        stored: the source's, by the authors' names.
        official: the model's.
        config: config.model.
        dtype: of parameters; constants are float32.

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
    expected = {name: "float32" if t.path is None else dtype for name, t in official.items()}
    other = [f"{name} is {t.dtype}" for name, t in stored.items() if t.dtype != expected[name]]
    if other:
        raise PublishedWeightsError(
            f"the source is not {dtype}: {_listed(other)}. Published weights are float32; 16-bit "
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
