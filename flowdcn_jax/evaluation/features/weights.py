"""From a file of published weights to a feature network's parameters."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from flowdcn_jax.autoencoders.weights import AutoencoderError, place_tensors, read_tensors
from flowdcn_jax.errors import UserError

COUNTER = "num_batches_tracked"  # what PyTorch's batch norms count in training

# PyTorch's name of a parameter, where it is not Flax's.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

Tensors = Mapping[str, np.ndarray]


class FeaturesError(UserError, ValueError):
    """A feature network, its weights or images that cannot be used; the message names them."""


class WeightsNotFoundError(FeaturesError, FileNotFoundError):
    """No weights there; the message tells what to fetch, from whom, and what to call."""


def read_weights(path: Path) -> tuple[Tensors, str]:
    """(tensors by name, SHA-256) of a safetensors file.

    Raises:
        FeaturesError: it is not a whole one.
    """
    try:
        return read_tensors({"": path})
    except AutoencoderError as error:
        raise FeaturesError(str(error)) from error


def check_values(tensors: Tensors, source: str) -> dict[str, np.ndarray]:
    """The tensors without PyTorch's counters, found to be float32 and finite.

    Raises:
        FeaturesError: it names the tensor.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    for name, tensor in kept.items():
        if tensor.dtype != np.float32:
            raise FeaturesError(f"{name} of {source} has dtype {tensor.dtype}; expected float32")
        if not np.isfinite(tensor).all():
            raise FeaturesError(f"{name} of {source} holds values that are not finite")
    return kept


def place(
    build: Callable[..., nnx.Module], tensors: Tensors, *, dtype: Any, source: str
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """(graphdef, parameters) of a network; parameters are nested dicts of float32 arrays.

    Modules have the names of the publisher's, so that a parameter's path is its tensor's name.

    Args:
        build: (dtype=, rngs=) -> the network.
        tensors: one a parameter, in PyTorch's axis order.
        dtype: the compute dtype.
        source: where the tensors are from, for messages.

    Raises:
        FeaturesError: tensors are missing, left over or of another shape; it names them.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(dtype=dtype, rngs=nnx.Rngs(0))))

    def tensor_name(path: tuple) -> str:
        return ".".join(map(str, (*path[:-1], _LEAVES.get(path[-1], path[-1]))))

    try:
        return graphdef, place_tensors(nnx.to_pure_dict(state), tensors, tensor_name, source)
    except AutoencoderError as error:
        raise FeaturesError(str(error)) from error
