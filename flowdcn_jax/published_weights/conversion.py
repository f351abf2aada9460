"""From published weights to a workdir, and from a workdir to the authors' names."""

import contextlib
import copy
import ctypes
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

from flowdcn_jax.config import validate
from flowdcn_jax.files import atomic_folder, atomic_path
from flowdcn_jax.models import abstract_model
from flowdcn_jax.published_weights.metadata import (
    EXPORTED_DTYPES,
    REMEDY,
    fit_config,
    metadata_of,
    stored_dtype,
    warn_of_other_outputs,
)
from flowdcn_jax.published_weights.names import POSITIONS, OfficialTensor, official_tensors
from flowdcn_jax.published_weights.selection import (
    check_constant,
    check_tensors,
    select_weights,
    warn_of_unused,
)
from flowdcn_jax.published_weights.weights_file import (
    PublishedWeightsError,
    StoredTensor,
    open_weights_file,
)
from flowdcn_jax.runs import checkpoint
from flowdcn_jax.runs.sharding import make_mesh, with_sharding
from flowdcn_jax.version import __version__

ORIGIN_FILE = "origin.json"
WEIGHTS = ("ema", "model")
WORKDIR_BYTES = 2**20  # of a workdir beside its weights, at most
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h


def convert(
    source: str | Path,
    config,
    workdir: str | Path,
    *,
    weights: str = "ema",
    boundary: str | None = None,
    progress: bool = False,
) -> dict:
    """Writes a workdir with the weights of `source` as checkpoint 0, for sampling and fine-tuning.

    Nothing is written before every tensor is found to fit; `workdir` is then there as a whole or
    not at all.

    Memory, after `give_back_freed_arrays`: the weights, about two of the largest tensor (one is
    copied and compressed on its way to the disk), and 0.36 GB of Python, libraries and compiled
    code. XL/2, 2476 MB of weights, took 2877 MB and 32 s of CPU time (python -m
    tests.published_weights.measure xl2; jax 0.10.2, two CPU cores, 2026-11-23).

    Args:
        source: a state dict (.pth, .pt), a Lightning checkpoint of FlowDCN's training, one of SiT's
            training, or safetensors of any of them (keys joined by dots). Their tensors are
            float32, or what an `export` to 16 bits says that it wrote.
        config: of the model, with the resolution that it was trained at (data.image_size), from
            which S_max adjustments start; other sizes are drawn with sample.py --image_size.
            FlowDCN's model.boundary is not taken from it.
        workdir: a folder that is empty or not there.
        weights: "ema" or "model"; a file with one set has neither, and that one is taken.
        boundary: of FlowDCN, "truncate" or "zeros"; None: what the metadata of an `export` says, or
            "truncate", with which the authors trained.
        progress: show a progress bar.

    Returns:
        The origin: what origin.json says.

    Raises:
        PublishedWeightsError: the source cannot be read or does not fit, or the workdir is taken.
        flowdcn_jax.errors.ConfigError: a value of `config`.
    """
    _check_choice(weights)
    source = Path(source)
    validate(config, num_devices=1, num_processes=1)
    config = copy.deepcopy(config)
    _check_free(Path(workdir))
    warn_of_dit(source.name)
    _warn_of_side(source.name, config)
    file = open_weights_file(source)
    fit_config(config, file.metadata, boundary=boundary)
    official = official_tensors(config.model, tokens_per_side=_config_side(config))
    chosen = select_weights(file, weights, official)
    _check_side(chosen.tensors, config)
    dtype = stored_dtype(file.metadata)
    check_tensors(chosen.tensors, official, config.model, dtype=dtype)
    warn_of_unused(chosen)
    _check_space("workdir", Path(workdir), _size_bytes(official) + WORKDIR_BYTES)

    params = {}
    for name, tensor in tqdm(official.items(), unit="tensor", disable=not progress):
        value = chosen.tensors[name].read().astype(np.float32, copy=False)
        if not np.isfinite(value).all():
            raise PublishedWeightsError(f"{name} of the source holds values that are not finite")
        if tensor.path is None:
            check_constant(tensor, value)
        else:
            params[tensor.path] = jax.device_put(tensor.to_ours(value))
    if progress:
        print(f"writing {workdir}", file=sys.stderr)
    origin = {
        "file": source.name,
        "sha256": _sha256(source),
        "format": f"{chosen.format} ({file.kind})",
        "weights": chosen.which,
        "image_size": config.data.image_size,
        "flowdcn_jax": __version__,
    }
    if dtype != "float32":
        origin["dtype"] = dtype
    if "boundary" in config.model:
        origin["boundary"] = config.model.boundary
    with _as_one_line("workdir", workdir), atomic_folder(Path(workdir)) as folder:
        checkpoint.save_weights(folder, traverse_util.unflatten_dict(params), config)
        text = json.dumps(origin, indent=2) + "\n"
        (folder / ORIGIN_FILE).write_text(text, encoding="utf-8")
    return origin


def export(
    workdir: str | Path,
    file: str | Path,
    *,
    weights: str = "ema",
    step: int | None = None,
    dtype: str = "float32",
    progress: bool = False,
) -> int:
    """Writes a run's weights under the authors' names, as safetensors; returns the step.

    In float32 it is the way back from `convert`, bit for bit, and the way to the authors' own code.
    What their format cannot say of the model is in the file's metadata.

    Args:
        workdir: of a run, or of converted weights.
        file: to write; replaced if it is there.
        weights: "ema", or "model": those that training goes on from.
        step: the checkpoint; the newest by default.
        dtype: of the parameters in the file: "float32", or "float16", half as large, which loses
            13 of 23 digits of each number's fraction. Constants are float32.
        progress: show a progress bar.

    Raises:
        PublishedWeightsError: the authors have no such model, `dtype` cannot hold a parameter, or
            `file` cannot be written.
        flowdcn_jax.runs.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    _check_choice(weights)
    if dtype not in EXPORTED_DTYPES:
        expected = " or ".join(EXPORTED_DTYPES)
        raise PublishedWeightsError(f"dtype is {dtype!r}; expected {expected}")
    _check_can_be_made("export", Path(file).parent)
    if Path(file).is_dir():
        raise PublishedWeightsError(f"--export={file} is a folder; expected a file")
    mesh = make_mesh(devices=jax.local_devices()[:1])
    restore = {"ema": checkpoint.restore_ema, "model": checkpoint.restore_params}[weights]
    saved = restore(
        str(workdir), step, lambda config: with_sharding(abstract_model(config.model)[1], mesh)
    )
    model, params = saved.config.model, traverse_util.flatten_dict(saved.params)
    saved.params.clear()  # so that `params` alone holds the arrays, each of which goes when written
    official = official_tensors(model, tokens_per_side=_config_side(saved.config))
    warn_of_other_outputs(model)
    _check_space("export", Path(file), _size_bytes(official))
    tensors = {}
    for name, tensor in tqdm(official.items(), unit="tensor", disable=not progress):
        if tensor.path is None:
            tensors[name] = tensor.constant
        else:
            value = tensor.to_theirs(np.asarray(params.pop(tensor.path)))
            tensors[name] = _as_dtype(name, value, dtype)
    with _as_one_line("export", file), atomic_path(Path(file)) as temporary:
        save_file(tensors, temporary, metadata=metadata_of(saved.config, dtype=dtype))
    return saved.step


def _as_dtype(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """The tensor with fewer digits; raises PublishedWeightsError where one is out of range."""
    if dtype == "float32":
        return value
    largest = np.finfo(dtype).max
    if (size := np.abs(value).max(initial=0)) > largest:
        raise PublishedWeightsError(
            f"{name} holds {size:.3g}; expected at most {largest:.3g}, the largest {dtype}: export "
            "as float32"
        )
    return value.astype(dtype)


def _check_choice(weights: str) -> None:
    if weights not in WEIGHTS:
        raise PublishedWeightsError(f"weights is {weights!r}; expected {' or '.join(WEIGHTS)}")


def _check_free(workdir: Path) -> None:
    """The workdir must be new or empty, and one that can be made."""
    if workdir.is_dir() and any(workdir.iterdir()):
        raise PublishedWeightsError(
            f"--workdir={workdir} is not empty; expected a new or empty folder"
        )
    _check_can_be_made("workdir", workdir)


def _check_can_be_made(flag: str, folder: Path) -> None:
    above = _existing_part(folder)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PublishedWeightsError(
            f"--{flag}: {folder} cannot be made a folder: {above} is "
            + ("not writable" if above.is_dir() else "a file")
        )


def _check_space(flag: str, path: Path, needed_bytes: int) -> None:
    """Found out now, and not after the work."""
    free_bytes = shutil.disk_usage(_existing_part(path)).free
    if free_bytes < needed_bytes:
        raise PublishedWeightsError(
            f"--{flag}={path} has {free_bytes / 1e6:,.0f} MB free; expected "
            f"{needed_bytes / 1e6:,.0f} MB, as the weights need"
        )


@contextlib.contextmanager
def _as_one_line(flag: str, path: str | Path) -> Iterator[None]:
    """What the file system refuses, which Orbax and safetensors have types of their own for."""
    orbax_log = logging.getLogger("absl")  # each of its threads would log a page
    level = orbax_log.level
    orbax_log.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        system = re.search(r"No space left on device|Disk quota exceeded", str(error))
        if not system and not isinstance(error, OSError | SafetensorError):
            raise
        cause = system[0] if system else error
        raise PublishedWeightsError(f"--{flag}={path} cannot be written: {cause}") from error
    finally:
        orbax_log.setLevel(level)


def _existing_part(path: Path) -> Path:
    """The path itself, or the closest of the folders that it lies in."""
    return next(part for part in (path, *path.absolute().parents) if part.exists())


def _config_side(config) -> int:
    return config.data.image_size // (config.autoencoder.downsampling * config.model.patch_size)


def _size_bytes(official: Mapping[str, OfficialTensor]) -> int:
    return sum(4 * math.prod(tensor.shape) for tensor in official.values())


def _check_side(tensors: Mapping[str, StoredTensor], config) -> None:
    """SiT's table of positions tells the resolution of training. FlowDCN's tensors do not."""
    shape = tensors[POSITIONS].shape if POSITIONS in tensors else ()
    side, expected = math.isqrt(shape[1]) if len(shape) == 3 else 0, _config_side(config)
    if config.model.name != "sit" or not side or side**2 != shape[1] or side == expected:
        return
    stride = config.data.image_size // expected
    raise PublishedWeightsError(
        f"the source was trained on images of {side * stride} pixels a side ({POSITIONS} has "
        f"{side}x{side} tokens), and config.data.image_size is {config.data.image_size}; {REMEDY}"
    )


def warn_of_dit(file: str) -> None:
    """Warns if the name of a weight file or config says DiT: the tensors can't."""
    name = Path(file).name
    if re.search(r"(?<![a-z])dit(?![a-z])", name, re.IGNORECASE):
        logging.warning(
            "%s: published DiT weights have SiT's tensors, but predict noise at times of 0 to 999: "
            "here they draw noise. Weights trained with SiT's objective are right",
            name,
        )


def _warn_of_side(name: str, config) -> None:
    """FlowDCN's tensors do not tell the resolution of training, but the authors' file names do."""
    side = re.search(r"(?:^|[-_.])R(\d+)(?=[-_.x]|$)", name)
    if side and int(side[1]) != config.data.image_size:
        logging.warning(
            "%s looks like weights trained on images of %s pixels a side, and "
            "config.data.image_size is %s; if so, %s",
            name,
            side[1],
            config.data.image_size,
            REMEDY,
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def give_back_freed_arrays() -> None:
    """Has glibc return every freed array to the system, for as long as the process runs.

    By itself it keeps those of up to 32 MB, in pieces: 0.2 GB in a conversion of XL/2. And it keeps
    smaller blocks apart for each thread, of which TensorStore fills 0.1 GB more. With another C
    library nothing changes. It is for commands: a library does not set its user's allocator.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**20)
        mallopt(M_ARENA_MAX, 1)
