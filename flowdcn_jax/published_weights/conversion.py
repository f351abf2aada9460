"""From published weights to a workdir, and from a workdir to the authors' names."""

import copy
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

import flowdcn_jax
from flowdcn_jax.files import atomic_folder, atomic_path
from flowdcn_jax.models import abstract_model
from flowdcn_jax.published_weights.checks import check_constant, check_tensors
from flowdcn_jax.published_weights.errors import PublishedWeightsError
from flowdcn_jax.published_weights.names import POSITIONS, official_tensors, pop, put
from flowdcn_jax.published_weights.source import Source, open_source, select_weights
from flowdcn_jax.training import checkpoint
from flowdcn_jax.training.sharding import make_mesh, with_sharding
from flowdcn_jax.validation import validate

ORIGIN_FILE = "origin.json"
WEIGHTS = ("ema", "model")


def convert(
    source: str | Path, config, workdir: str | Path, *, weights: str = "ema", progress: bool = False
) -> dict:
    """Writes a workdir with the weights of `source` as checkpoint 0, for sampling and fine-tuning.

    Nothing is written before every tensor is found to fit; `workdir` is then there as a whole or
    not at all. Memory: the weights and a few tensors.

    Args:
        source: a state dict (.pth, .pt), a Lightning checkpoint of FlowDCN's training, one of SiT's
            training, or safetensors of any of them (keys joined by dots).
        config: of the model, with the resolution that it is to be used at. FlowDCN's model.boundary
            becomes "truncate", which its weights were trained with.
        workdir: a folder that is empty or not there.
        weights: "ema" or "model"; a file with one set has neither, and that one is taken.
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
    if config.model.name == "flowdcn":
        config.model.boundary = "truncate"
    _check_free(Path(workdir))
    opened = open_source(source)
    official = official_tensors(config.model, tokens_per_side=_trained_side(opened, config))
    chosen = select_weights(opened, weights, official)
    check_tensors(chosen.tensors, official, config.model)
    _check_space(Path(workdir), sum(4 * math.prod(t.shape) for t in official.values()))

    params: dict = {}
    for name, tensor in tqdm(official.items(), unit="tensor", disable=not progress):
        value = chosen.tensors[name].read()
        if not np.isfinite(value).all():
            raise PublishedWeightsError(f"{name} of the source holds values that are not finite")
        if tensor.path is None:
            check_constant(tensor, value)
        else:
            put(params, tensor.path, jax.device_put(tensor.to_ours(value)))
    if progress:
        print(f"writing {workdir}", file=sys.stderr)
    origin = {
        "file": source.name,
        "sha256": _sha256(source),
        "format": f"{chosen.format} ({opened.kind})",
        "weights": chosen.which,
        "flowdcn_jax": flowdcn_jax.__version__,
    }
    try:
        with atomic_folder(Path(workdir)) as folder:
            checkpoint.save_weights(folder, params, config)
            text = json.dumps(origin, indent=2) + "\n"
            (folder / ORIGIN_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PublishedWeightsError(f"--workdir={workdir} cannot be written: {error}") from error
    return origin


def export(
    workdir: str | Path,
    file: str | Path,
    *,
    weights: str = "ema",
    step: int | None = None,
    progress: bool = False,
) -> int:
    """Writes a run's weights under the authors' names, as safetensors; returns the step.

    The way back from `convert`, bit for bit, and the way to the authors' own code.

    Args:
        workdir: of a run, or of converted weights.
        file: to write; replaced if it is there.
        weights: "ema", or "model": those that training goes on from.
        step: the checkpoint; the newest by default.
        progress: show a progress bar.

    Raises:
        PublishedWeightsError: the authors have no such model, or `file` cannot be written.
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    _check_choice(weights)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    restore = {"ema": checkpoint.restore_ema, "model": checkpoint.restore_params}[weights]
    saved = restore(
        str(workdir), step, lambda config: with_sharding(abstract_model(config.model)[1], mesh)
    )
    model = saved.config.model
    official = official_tensors(model, tokens_per_side=_config_side(saved.config))
    if model.name == "flowdcn" and model.boundary != "truncate":
        logging.warning(
            "these weights were trained with model.boundary=%r; the authors' code truncates, so "
            "it gives other outputs",
            model.boundary,
        )
    tensors = {}
    for name, tensor in tqdm(official.items(), unit="tensor", disable=not progress):
        if tensor.path is None:
            tensors[name] = tensor.constant
        else:
            tensors[name] = tensor.to_theirs(np.asarray(pop(saved.params, tensor.path)))
    try:
        with atomic_path(Path(file)) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except OSError as error:
        raise PublishedWeightsError(f"--export={file} cannot be written: {error}") from error
    return saved.step


def _check_choice(weights: str) -> None:
    if weights not in WEIGHTS:
        raise PublishedWeightsError(f"weights is {weights!r}; expected {' or '.join(WEIGHTS)}")


def _check_free(workdir: Path) -> None:
    """The workdir must be new or empty, and one that can be made."""
    if workdir.is_dir() and any(workdir.iterdir()):
        raise PublishedWeightsError(
            f"--workdir={workdir} is not empty; expected a new or empty folder"
        )
    above = _existing_part(workdir)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PublishedWeightsError(
            f"--workdir={workdir} cannot be made a folder: {above} is "
            + ("not writable" if above.is_dir() else "a file")
        )


def _check_space(workdir: Path, needed_bytes: int) -> None:
    """Found out now, for Orbax tells a full disk in a hundred lines."""
    free_bytes = shutil.disk_usage(_existing_part(workdir)).free
    if free_bytes < needed_bytes:
        raise PublishedWeightsError(
            f"--workdir={workdir} has {free_bytes / 1e6:,.0f} MB free; expected "
            f"{needed_bytes / 1e6:,.0f} MB, as the weights need"
        )


def _existing_part(path: Path) -> Path:
    """The path itself, or the closest of the folders that it lies in."""
    return next(part for part in (path, *path.absolute().parents) if part.exists())


def _config_side(config) -> int:
    return config.data.image_size // (config.autoencoder.downsampling * config.model.patch_size)


def _trained_side(source: Source, config) -> int:
    """Tokens per side of the images that SiT was trained on, by its table of positions.

    It may be smaller than the config's: positions are integers at any size.
    """
    for name, tensor in source.tensors.items():
        if name.split(".")[-1] == POSITIONS and len(tensor.shape) == 3:
            side = math.isqrt(tensor.shape[1])
            if side**2 == tensor.shape[1]:
                return side
    return _config_side(config)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
