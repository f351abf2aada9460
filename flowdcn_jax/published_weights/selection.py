"""Which set of weights of a file: its EMA or those of training, by the authors' names."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from flowdcn_jax.published_weights.errors import PublishedWeightsError
from flowdcn_jax.published_weights.names import OfficialTensor
from flowdcn_jax.published_weights.source import Source, StoredTensor

LIGHTNING_STATE = "state_dict."
LIGHTNING_EMA = "optimizer_states.0.ema."
LIGHTNING_PREFIX = "denoiser."
SIT_SETS = {"ema": "ema.", "model": "model."}


class Weights(NamedTuple):
    """One set of weights of a file, by the authors' names."""

    format: str  # what the file is
    which: str  # ema or model; only: the file holds no other
    tensors: dict[str, StoredTensor]
    unused: dict[str, StoredTensor]  # the EMA list's values of constants


def select_weights(source: Source, which: str, official: Mapping[str, OfficialTensor]) -> Weights:
    """One of the sets of weights in a file, of which nothing is read yet.

    A file with one set has neither "ema" nor "model": that one is taken.

    Args:
        which: "ema" or "model".
        official: the tensors of the model, in the order of the authors' `parameters()`.

    Raises:
        PublishedWeightsError: the file has not that set, its nameless EMA list does not go with its
            state dict, or it has a tensor twice.
    """
    tensors = source.tensors
    state = _below(tensors, LIGHTNING_STATE)
    if state:
        state = _without_prefix(state)
        unused: dict[str, StoredTensor] = {}
        if which == "ema":
            state, unused = _name_ema(source, state, official)
        return Weights("Lightning checkpoint", which, state, unused)
    bare = _without_prefix(tensors)
    sets = {name: _below(tensors, prefix) for name, prefix in SIT_SETS.items()}
    if any(sets.values()) and bare.keys().isdisjoint(official):
        if not sets[which]:
            (only,) = (name for name in sets if sets[name])
            raise PublishedWeightsError(
                f"the source holds one set of weights, {SIT_SETS[only]}*; --weights={only} takes it"
            )
        return Weights("SiT checkpoint", which, sets[which], {})
    return Weights("state dict", "only", bare, {})


def warn_of_unused(weights: Weights) -> None:
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
    source: Source,
    state: Mapping[str, StoredTensor],
    official: Mapping[str, OfficialTensor],
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The nameless EMA list, named by the order of `parameters()`: that of the state dict.

    Safetensors files keep no order, so there the official one stands in for it. Constants come from
    the state dict: they were never trained, so there is no average of them to take. Those of the
    list are the second result.
    """
    ema = _below(source.tensors, LIGHTNING_EMA)
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
    if source.kind == "safetensors":
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
