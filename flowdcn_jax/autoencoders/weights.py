"""Published weights: finding the files, reading safetensors, putting each tensor in its place."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file

from flowdcn_jax.errors import UserError
from flowdcn_jax.faults import retried
from flowdcn_jax.files import local_path
from flowdcn_jax.weight_names import in_hub_cache, lfs_pointer, plain_names

CONFIG_FILE = "config.json"
_NAMED = 3  # tensors that a message names

# Files that together hold an autoencoder: what to put before the names in each, and the file.
Files = Mapping[str, str]


class AutoencoderError(UserError, ValueError):
    """Weights or images that an autoencoder cannot use; the message names them."""


class WeightsNotFoundError(AutoencoderError, FileNotFoundError):
    """No weights where the config says; the message tells which to fetch and which key to set."""


def find_files(weights: str | None, choices: Sequence[Files], how_to_get: str) -> dict[str, Path]:
    """{prefix of names: file} of the files that hold an autoencoder's weights.

    `weights` is a file that holds all of them, or a folder with one of `choices`, perhaps in
    half precision (.fp16.safetensors), also a model's folder in Hugging Face's cache.

    Raises:
        WeightsNotFoundError: no such file or folder, or none of `choices` in it.
    """
    problem = f"config.autoencoder.weights is {weights!r}"
    if weights is not None:
        path = local_path(weights)
        if path.is_file():
            return {"": path}
        folder = in_hub_cache(path)
        for half in ("", ".fp16"):  # as diffusers names copies of half the size
            for files in choices:
                found = {
                    prefix: folder / name.replace(".safetensors", f"{half}.safetensors")
                    for prefix, name in files.items()
                }
                if all(file.is_file() for file in found.values()):
                    return found
        names = " or ".join(" and ".join(files.values()) for files in choices)
        problem += f", a folder without {names}" if path.is_dir() else ", which is not there"
    raise WeightsNotFoundError(f"{problem}. {how_to_get}")


def read_tensors(files: Mapping[str, Path]) -> tuple[dict[str, np.ndarray], str]:
    """(tensors by name with its file's prefix, SHA-256 of the files' bytes one after the other).

    Prefixes of wrappers (module., _orig_mod.) are dropped from names.

    Raises:
        AutoencoderError: not a whole safetensors file, or numbers of a type that NumPy has not.
    """
    tensors, digest = {}, hashlib.sha256()
    for prefix, path in files.items():
        content = retried(functools.partial(_read_file, path))
        try:
            names = plain_names(content)
        except ValueError as error:
            raise AutoencoderError(f"{path} cannot be used: {error}") from error
        tensors |= {prefix + plain: content[name] for plain, name in names.items()}
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # goes on with the files before
    return tensors, digest.hexdigest()


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        if lfs_pointer(path):
            raise AutoencoderError(
                f"{path} is not a whole safetensors file but the pointer that Git LFS leaves in "
                "its place; fetch the file itself, with git lfs pull"
            )
        return load_file(path)
    except (AttributeError, TypeError, KeyError) as error:  # such as numbers of 8 bits
        raise AutoencoderError(
            f"{path} holds numbers of a type that is not read ({error}); expected float16, "
            "bfloat16 or float32"
        ) from error
    except (SafetensorError, ValueError, OSError) as error:
        if isinstance(error, AutoencoderError):
            raise
        raise AutoencoderError(
            f"{path} is not a whole safetensors file ({error}); expected one, not a .pth or .bin"
        ) from error


def read_config(folder: Path, class_name: str) -> dict:
    """The config.json in `folder`; {} if there is none.

    Raises:
        AutoencoderError: not JSON, or of another class than `class_name`.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        found = config.get("_class_name", class_name)
    except (ValueError, AttributeError) as error:
        raise AutoencoderError(f"{path} is not the config.json of diffusers: {error}") from error
    if found != class_name:
        raise AutoencoderError(
            f"{path} describes a {found}; config.autoencoder.name asks for a {class_name}"
        )
    return config


def check_config(config: Mapping, expected: Mapping, source: str) -> None:
    """Refuses a config.json that says anything else than `expected`; it may say nothing.

    Raises:
        AutoencoderError: it names the key and both values.
    """
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise AutoencoderError(
                f"config.json of {source} says {key}={config[key]!r}; expected {value!r}"
            )


def tensor_name(path: tuple) -> str:
    """What PyTorch calls the parameter at `path`, with the publisher's names of modules."""
    leaf = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
    return ".".join(map(str, (*path[:-1], leaf)))


def place_tensors(
    abstract: dict,
    tensors: Mapping[str, np.ndarray],
    tensor_name: Callable[[tuple], str],
    source: str,
) -> dict:
    """Parameters like `abstract` (nested dicts), float32, from PyTorch's tensors.

    Raises:
        AutoencoderError: tensors are missing, left over, of another shape, not numbers or not
            finite; the message names them, and `source`, where they are from.
    """
    flat = traverse_util.flatten_dict(abstract)
    names = {path: tensor_name(path) for path in flat}
    missing = sorted(set(names.values()) - tensors.keys())
    if missing:
        raise AutoencoderError(f"{source} lacks {_listed(missing)}")
    extra = sorted(tensors.keys() - set(names.values()))
    if extra:
        raise AutoencoderError(f"{source} holds {_listed(extra)}, which has no place in the model")
    placed = {}
    for path, leaf in flat.items():
        placed[path] = _to_jax(tensors[names[path]], leaf.shape, f"{names[path]} of {source}")
        if not np.isfinite(placed[path]).all():
            raise AutoencoderError(f"{names[path]} of {source} holds values that are not finite")
    return traverse_util.unflatten_dict(placed)


def _to_jax(tensor: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A weight [out,in] or [out,in,h,w] as [in,out] or [h,w,in,out]; a vector as it is."""
    if len(shape) == 2 and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]  # old files hold some Linears as 1x1 convolutions
    moved = tensor.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(tensor.ndim, range(tensor.ndim)))
    if moved.shape != shape:
        expected = (*shape[:-3:-1], *shape[:-2])
        raise AutoencoderError(f"{name} has shape {tensor.shape}; expected {expected}")
    if tensor.dtype.kind in "iub":
        raise AutoencoderError(f"{name} has dtype {tensor.dtype}; expected floating point")
    return np.ascontiguousarray(moved, np.float32)


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
