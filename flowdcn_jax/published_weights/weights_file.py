"""Reading weight files, a tensor at a time: PyTorch's without running code, and safetensors.

A file is seen as flat names. A checkpoint's keys are joined by dots, so that a tensor has the same
name in either kind of file, such as `state_dict.denoiser.final_layer.linear.bias`.
"""

import argparse
import functools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from flowdcn_jax.errors import UserError
from flowdcn_jax.weight_names import lfs_pointer, plain_names

MIN_TORCH = (2, 5)  # the first with safe_globals
TORCH_SUFFIXES = (".pth", ".pt", ".ckpt")
REMAP_BYTES = 2**27
READ_BYTES = 2**20
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class PublishedWeightsError(UserError, ValueError):
    """Weights that cannot be used; the message names the file, tensor or folder and the remedy."""


class StoredTensor(NamedTuple):
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    dtype: str  # NumPy's name of it
    read: Callable[[], np.ndarray]


class WeightsFile(NamedTuple):
    """A file of weights, of which nothing large is read yet."""

    kind: str  # torch or safetensors
    tensors: dict[str, StoredTensor]  # torch: in the order in which they were saved
    metadata: dict[str, str] = {}  # safetensors alone; never changed in place


def open_weights_file(path: Path) -> WeightsFile:
    """The tensors of a file, by what it begins with, whatever its name.

    Prefixes of wrappers (module., _orig_mod.) are dropped from the tensors' names.

    Raises:
        PublishedWeightsError: no such file, neither of the two kinds, damaged (PyTorch's files of
            1.6 and later carry checksums; the others do not), asking for code to be run, or PyTorch
            is missing, or too old, for a file of its own.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise PublishedWeightsError(f"--source={path} cannot be read: {error.strerror}") from error
    if head[8:9] == b"{":  # after the header's length, which can be any bytes
        return _plainly_named(_open_safetensors(path), path)
    if head[:2] == b"PK":
        return _plainly_named(_open_torch(path, is_zip=True), path)
    if head[:1] == b"\x80":  # a pickle: PyTorch's form of before 1.6
        return _plainly_named(_open_torch(path, is_zip=False), path)
    if lfs_pointer(path):
        raise PublishedWeightsError(
            f"--source={path} is the pointer that Git LFS leaves in the place of a file; fetch the "
            "file itself, with git lfs pull"
        )
    raise PublishedWeightsError(
        f"--source={path} is neither a PyTorch file (.pth, .pt, .ckpt) nor safetensors: it begins "
        f"with {head[:8]!r}"
    )


def check_readable(name: str) -> None:
    """Finds out, by a file's name and before there is a file, whether it could be read here.

    Raises:
        PublishedWeightsError: it is PyTorch's, which is missing or too old.
    """
    if Path(name).suffix in TORCH_SUFFIXES:
        _import_torch(name)


def _plainly_named(file: WeightsFile, path: Path) -> WeightsFile:
    try:
        names = plain_names(file.tensors)
    except ValueError as error:
        raise PublishedWeightsError(f"--source={path} cannot be used: {error}") from error
    return file._replace(tensors={plain: file.tensors[name] for plain, name in names.items()})


def _open_safetensors(path: Path) -> WeightsFile:
    def read(name: str) -> np.ndarray:
        # Opened anew each time: the pages that were read would otherwise stay in memory.
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    tensors: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            for name in file.keys():
                tensor = file.get_slice(name)
                code = tensor.get_dtype()
                dtype = SAFETENSORS_DTYPES.get(code, code.lower())
                shape = tuple(tensor.get_shape())
                tensors[name] = StoredTensor(shape, dtype, functools.partial(_read, read, name))
    except SafetensorError as error:
        raise PublishedWeightsError(
            f"--source={path} is not a whole safetensors file: {error}"
        ) from error
    return WeightsFile("safetensors", tensors, metadata)


def _open_torch(path: Path, *, is_zip: bool) -> WeightsFile:
    torch = _import_torch(f"--source={path}")
    if is_zip:
        _check_zip(path)
    file = _TorchFile(path, torch, mmap=is_zip)
    tensors = {
        name: StoredTensor(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            functools.partial(_read, file.read, name),
        )
        for name, tensor in file.tensors.items()
    }
    return WeightsFile("torch", tensors)


def _read(read: Callable[[str], np.ndarray], name: str) -> np.ndarray:
    """read(name); whatever that raises becomes an error that names the tensor."""
    try:
        return read(name)
    except (MemoryError, PublishedWeightsError):
        raise
    except Exception as error:  # a sparse tensor, one without data, a type unknown to NumPy
        raise PublishedWeightsError(
            f"{name} of the source cannot be read as an array: {_first_line(error)}"
        ) from error


def _import_torch(file: str) -> ModuleType:
    """PyTorch, once it is found to be there and new enough."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries
        problem = f"the PyTorch that is installed cannot be loaded: {_first_line(error)}"
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            problem = (
                "PyTorch, which nothing else here needs, is not installed. Install its CPU build "
                "(pip install torch --index-url https://download.pytorch.org/whl/cpu), or give the "
                "weights as safetensors"
            )
        raise PublishedWeightsError(f"{file} is a PyTorch file, and {problem}") from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < MIN_TORCH:
        raise PublishedWeightsError(
            f"{file} is a PyTorch file, and PyTorch {torch.__version__} is installed; "
            f"expected {'.'.join(map(str, MIN_TORCH))} or later, or the weights as safetensors"
        )
    return torch


def _check_zip(path: Path) -> None:
    """The file holds what was saved: PyTorch does not look at the checksums when it maps a file.

    Raises:
        PublishedWeightsError: it names the part of the file that was changed.
    """
    try:
        with zipfile.ZipFile(path) as file:
            for entry in file.infolist():
                if not entry.CRC:  # PyTorch can be told to save without (set_crc32_options)
                    continue
                with file.open(entry) as part:
                    while part.read(READ_BYTES):  # checked at the end of the part
                        pass
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes zipfile raise
        raise PublishedWeightsError(
            f"--source={path} cannot be read: it is truncated or damaged ({_first_line(error)})"
        ) from error


class _TorchFile:
    """A file of PyTorch's, mapped to memory if its format allows (that of 1.6 and later does)."""

    def __init__(self, path: Path, torch: ModuleType, *, mmap: bool):
        self.path = path
        self.torch = torch
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
        # SiT's training script keeps its arguments beside the weights.
        with self.torch.serialization.safe_globals([argparse.Namespace]):
            try:
                tree = self.torch.load(self.path, "cpu", weights_only=True, mmap=self.mmap)
            except MemoryError:
                raise
            except Exception as error:  # whatever a damaged file makes it raise
                raise PublishedWeightsError(f"--source={self.path} {_explain(error)}") from error
        tensors: dict = {}
        for name, tensor in _flatten(tree, self.torch.Tensor):
            if name in tensors:
                raise PublishedWeightsError(f"--source={self.path} holds two tensors named {name}")
            tensors[name] = tensor
        return tensors


def _explain(error: Exception) -> str:
    """Why torch.load failed, in a line in place of its page."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return (
            f"is refused: besides weights it holds code or objects ({code[1]}), and files of "
            "strangers are read for weights alone. Nothing of it was run. If you trust its "
            'author, save the weights alone: tree = torch.load(FILE, "cpu", weights_only=False); '
            'keys = ("state_dict", "optimizer_states"); '
            "torch.save({key: tree[key] for key in keys}, NEW_FILE)"
        )
    return (
        "cannot be read: it is truncated or damaged, or no PyTorch file "
        f"({type(error).__name__}: {_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


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
