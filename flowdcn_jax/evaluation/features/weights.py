"""From a file of published weights to a feature network's parameters."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors import safe_open

from flowdcn_jax.autoencoders.weights import AutoencoderError, place_tensors, read_tensors
from flowdcn_jax.errors import UserError

COUNTER = "num_batches_tracked"  # what PyTorch's batch norms count in training

# PyTorch's name of a parameter, where it is not Flax's.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

Tensors = Mapping[str, np.ndarray]  # by name, in PyTorch's axis order
# (publisher's tensors, their file) -> (builder, a tensor a parameter); builder(dtype=, rngs=).
Reader = Callable[[Tensors, Path], tuple[Callable[..., nnx.Module], Tensors]]


class FeaturesError(UserError, ValueError):
    """A feature network, its weights or images that cannot be used; the message names them."""


class WeightsNotFoundError(FeaturesError, FileNotFoundError):
    """No weights there; the message tells what to fetch, from whom, and what to call."""


def read_weights(path: Path) -> tuple[Tensors, str]:
    """(tensors, SHA-256) of a safetensors file.

    Raises:
        FeaturesError: it is not a whole one.
    """
    try:
        return read_tensors({"": path})
    except AutoencoderError as error:
        raise FeaturesError(str(error)) from error


def read_origin(path: Path) -> dict[str, Any]:
    """What a file of convert_features keeps of its source: its name and SHA-256; {} of others."""
    with safe_open(path, "np") as file:
        try:
            origin = json.loads((file.metadata() or {}).get("origin", "{}"))
        except ValueError:
            return {}
    return origin if isinstance(origin, dict) else {}


def place_weights(
    read: Reader, tensors: Tensors, path: Path, *, dtype: Any
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """(graphdef, parameters) of a network; parameters are nested dicts of float32 arrays.

    A parameter's path is its tensor's name: modules are called as the publisher's.

    Args:
        read: the network's.
        tensors: the publisher's, of which PyTorch's counters are left out.
        path: where they are from.
        dtype: the compute dtype.

    Raises:
        FeaturesError: tensors that are missing, left over, of another shape, not float32 or not
            finite; it names them.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    for name, tensor in kept.items():
        if tensor.dtype != np.float32:
            raise FeaturesError(f"{name} of {path} has dtype {tensor.dtype}; expected float32")
        if not np.isfinite(tensor).all():
            raise FeaturesError(f"{name} of {path} holds values that are not finite")
    build, placed = read(kept, path)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(dtype=dtype, rngs=nnx.Rngs(0))))

    def tensor_name(path: tuple) -> str:
        return ".".join(map(str, (*path[:-1], _LEAVES.get(path[-1], path[-1]))))

    try:
        return graphdef, place_tensors(nnx.to_pure_dict(state), placed, tensor_name, str(path))
    except AutoencoderError as error:
        raise FeaturesError(str(error)) from error
