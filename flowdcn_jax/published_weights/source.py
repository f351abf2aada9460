"""Reading weight files, a tensor at a time: PyTorch's without running code, and safetensors.

A file is seen as flat names. A checkpoint's keys are joined by dots, so that a tensor has the same
name in either kind of file, such as `state_dict.denoiser.final_layer.linear.bias`.
"""

import argparse
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from flowdcn_jax.published_weights.errors import PublishedWeightsError
from flowdcn_jax.published_weights.names import OfficialTensor

LIGHTNING_STATE = "state_dict."
LIGHTNING_EMA = "optimizer_states.0.ema."
LIGHTNING_PREFIX = "denoiser."
SIT_SETS = {"ema": "ema.", "model": "model."}
REMAP_BYTES = 2**27
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class StoredTensor(NamedTuple):
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    dtype: str  # NumPy's name of it
    read: Callable[[], np.ndarray]


class Source(NamedTuple):
    """A weight file."""

    kind: str  # torch or safetensors
    tensors: dict[str, StoredTensor]  # torch: in the order in which they were saved


class Weights(NamedTuple):
    """One set of weights of a file, by the authors' names."""

    format: str  # what the file is
    which: str  # ema or model; only: the file holds no other
    tensors: dict[str, StoredTensor]


def open_source(path: Path) -> Source:
    """The tensors of a file, by what it begins with, whatever its name.

    Raises:
        PublishedWeightsError: no such file, neither of the two kinds, damaged, asking for code to
            be run, or PyTorch is missing for a file of its own.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise PublishedWeightsError(f"--source={path} cannot be read: {error.strerror}") from error
    if head[8:9] == b"{":  # after the header's length, which can be any bytes
        return _open_safetensors(path)
    if head[:2] == b"PK":
        return _open_torch(path, mmap=True)
    if head[:1] == b"\x80":  # a pickle: PyTorch's form of before 1.6
        return _open_torch(path, mmap=False)
    raise PublishedWeightsError(
        f"--source={path} is neither a PyTorch file (.pth, .pt, .ckpt) nor safetensors: it begins "
        f"with {head[:8]!r}"
    )


def select_weights(source: Source, which: str, official: Mapping[str, OfficialTensor]) -> Weights:
    """One of the sets of weights in a file.

    A file with one set has neither "ema" nor "model": that one is taken.

    Args:
        which: "ema" or "model".
        official: the tensors of the model, in the order of the authors' `parameters()`.

    Raises:
        PublishedWeightsError: the file has several sets but not that one, or its nameless EMA list
            does not go with its state dict.
    """
    tensors = source.tensors
    state = _below(tensors, LIGHTNING_STATE)
    if state:
        state = {name.removeprefix(LIGHTNING_PREFIX): state[name] for name in state}
        if which == "ema":
            state = _name_ema(source, state, official)
        return Weights("Lightning checkpoint", which, state)
    sets = {name: _below(tensors, prefix) for name, prefix in SIT_SETS.items()}
    if any(sets.values()):
        if not sets[which]:
            raise PublishedWeightsError(f"the source holds no {SIT_SETS[which]}* tensors")
        return Weights("SiT checkpoint", which, sets[which])
    bare = {name.removeprefix(LIGHTNING_PREFIX): tensor for name, tensor in tensors.items()}
    return Weights("state dict", "only", bare)


def _name_ema(
    source: Source,
    state: Mapping[str, StoredTensor],
    official: Mapping[str, OfficialTensor],
) -> dict[str, StoredTensor]:
    """The nameless EMA list, named by the order of `parameters()`: that of the state dict.

    Safetensors files keep no order, so there the official one stands in for it. Constants come from
    the state dict: they were never trained, so there is no average of them to take.
    """
    ema = _below(source.tensors, LIGHTNING_EMA)
    if not ema:
        raise PublishedWeightsError(
            f"the source's {LIGHTNING_EMA}* holds no EMA; --weights=model takes the other weights"
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
    moved = [n for n in constants if not np.array_equal(named[n].read(), state[n].read())]
    if moved:
        logging.warning(
            "the EMA list has other values for constants, such as %s; those of the state dict, "
            "with which the model was trained, are used",
            moved[0],
        )
    return named | {name: state[name] for name in constants}


def _below(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _open_safetensors(path: Path) -> Source:
    def read(name: str) -> np.ndarray:
        # Opened anew each time: the pages that were read would otherwise stay in memory.
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    tensors: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                tensor = file.get_slice(name)
                code = tensor.get_dtype()
                dtype = SAFETENSORS_DTYPES.get(code, code.lower())
                shape = tuple(tensor.get_shape())
                tensors[name] = StoredTensor(shape, dtype, functools.partial(read, name))
    except SafetensorError as error:
        raise PublishedWeightsError(
            f"--source={path} is not a whole safetensors file: {error}"
        ) from error
    return Source("safetensors", tensors)


def _open_torch(path: Path, *, mmap: bool) -> Source:
    file = _TorchFile(path, mmap)
    tensors = {
        name: StoredTensor(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            functools.partial(file.read, name),
        )
        for name, tensor in file.tensors.items()
    }
    return Source("torch", tensors)


class _TorchFile:
    """A file of PyTorch's, mapped to memory if its format allows (that of 1.6 and later does)."""

    def __init__(self, path: Path, mmap: bool):
        self.path = path
        self.mmap = mmap
        self.tensors = self._load()
        self.read_bytes = 0  # since the file was mapped

    def read(self, name: str) -> np.ndarray:
        if self.mmap and self.read_bytes > REMAP_BYTES:
            self.tensors = {}  # the pages that were read stay in memory until the mapping goes
            self.tensors = self._load()
            self.read_bytes = 0
        array = self.tensors[name].detach().numpy().copy()  # or it would hold the mapping
        self.read_bytes += array.nbytes
        return array

    def _load(self) -> dict:
        """The tensors by their joined keys."""
        try:
            import torch
        except ImportError as error:
            raise PublishedWeightsError(
                f"--source={self.path} is a PyTorch file, and PyTorch, which nothing else here "
                "needs, is not installed. Install its CPU build (pip install torch --index-url "
                "https://download.pytorch.org/whl/cpu), or give the weights as safetensors"
            ) from error
        try:
            # SiT's training script keeps its arguments beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                tree = torch.load(self.path, "cpu", weights_only=True, mmap=self.mmap)
        except Exception as error:  # whatever a damaged file makes it raise
            raise PublishedWeightsError(f"--source={self.path} {_explain(error)}") from error
        return dict(_flatten(tree, torch.Tensor))


def _explain(error: Exception) -> str:
    """Why torch.load failed, in a line in place of its page."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return (
            f"is refused: besides weights it holds code or objects ({code[1]}), and files of "
            "strangers are read for weights alone. Nothing of it was run"
        )
    first_line = (str(error).splitlines() or [""])[0]
    return (
        f"cannot be read: it is truncated or damaged, or no PyTorch file ({type(error).__name__}: "
        f"{first_line[:200]})"
    )


def _flatten(tree: Any, leaf_type: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(keys joined by dots, leaf) for the leaves of that type in nested dicts, lists and tuples."""
    if isinstance(tree, leaf_type):
        yield prefix.removesuffix("."), tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(value, leaf_type, f"{prefix}{key}.")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _flatten(value, leaf_type, f"{prefix}{number}.")
