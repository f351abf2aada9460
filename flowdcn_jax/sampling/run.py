"""Drawing images with a training run: to a folder, as sample.py does, or to an array."""

import dataclasses
import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from flowdcn_jax.autoencoders import decode_pixels, preview_latents
from flowdcn_jax.images import grid_columns, make_grid, save_png
from flowdcn_jax.sampling.classes import class_labels
from flowdcn_jax.sampling.folder import SampleFolder
from flowdcn_jax.sampling.generator import device_batch_size, draw_batches, generate_images
from flowdcn_jax.sampling.request import Request
from flowdcn_jax.sampling.settings import SamplingError, Settings
from flowdcn_jax.sampling.trained_model import TrainedModel, load_trained
from flowdcn_jax.training import checkpoint

MAX_GRID_IMAGES = 100  # the grid shows the first ones


def sample_to_folder(
    model: TrainedModel,
    settings: Settings,
    request: Request,
    *,
    out: str | Path | None = None,
    save_images: bool = False,
) -> Path:
    """Draws images to a folder, going on where an earlier call stopped; what sample.py does.

    Every process of a distributed job calls it; the first one writes.

    Args:
        model: of `load_trained`.
        settings: how to sample.
        request: which images.
        out: the folder; None: one in WORKDIR/samples for these settings.
        save_images: write each image as a PNG too.

    Returns:
        The path of the grid, in the folder.

    Raises:
        SamplingError: a value that cannot be used, or a folder with another run's images.
        flowdcn_jax.errors.UserError: the autoencoder's weights are not there, or do not fit.
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    settings = model.fill_settings(settings)
    labels = model.labels(request, seed=settings.seed)
    generator = model.generator(settings)
    record = describe(model, settings, labels)
    path = Path(out) if out else default_path(model.source.workdir, record)
    folder = SampleFolder(path, len(labels))

    missing = _open_everywhere(folder, record)
    print_cost(settings)
    batch_size = device_batch_size(request.batch_size, len(labels)) * model.mesh.size
    _draw_missing(folder, missing, generator, model, labels, batch_size)
    grid = folder.path / "grid.png"
    if jax.process_index() == 0:
        folder.join()
        _write_pictures(folder, grid, model, record, labels, save_images=save_images)
    return grid


def generate(
    model: TrainedModel | str | Path,
    *,
    step: int | None = None,
    guide_workdir: str | Path | None = None,
    guide_step: int | None = None,
    classes: Sequence[str | int] | str | int | None = None,
    labels: str = "balanced",
    num_images: int | None = None,
    batch_size: int = Request.batch_size,
    progress: bool = True,
    autoencoder: str | None = None,
    autoencoder_weights: str | Path | None = None,
    image_size: tuple[int, int] | str | None = None,
    sampler: str | None = None,
    num_steps: int | None = None,
    last_step: float | None = None,
    time_shift: float = 1.0,
    diffusion: str | None = None,
    guidance: float | None = None,
    guidance_channels: str = "all",
    guidance_interval: tuple[float, float] | None = None,
    guidance_schedule: str = "constant",
    resolution_adjustment: str | None = None,
    seed: int | None = None,
) -> np.ndarray:
    """Images of a trained model, uint8 [num_images,H,W,C]: those that sample.py writes.

    Args:
        model: the workdir of a training run; or `load_trained`'s model, which keeps weights and
            compiled programs, so that the next call starts at once.
        progress: show a bar, and how often the model is evaluated.
        The others are sample.py's flags: `load_trained`, `Settings` and `Request` describe them.
            Latents without a decoder give previews.

    Raises:
        SamplingError: a value that cannot be used.
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    request = Request(classes=classes, labels=labels, num_images=num_images, batch_size=batch_size)
    settings = Settings(
        image_size=image_size,
        sampler=sampler,
        num_steps=num_steps,
        last_step=last_step,
        time_shift=time_shift,
        diffusion=diffusion,
        guidance=guidance,
        guidance_channels=guidance_channels,
        guidance_interval=guidance_interval,
        guidance_schedule=guidance_schedule,
        resolution_adjustment=resolution_adjustment,
        seed=seed,
    )
    which = dict(
        step=step,
        guide_workdir=guide_workdir,
        guide_step=guide_step,
        autoencoder=autoencoder,
        autoencoder_weights=autoencoder_weights,
    )
    if not isinstance(model, TrainedModel):
        model = load_trained(model, **which)
    elif given := [name for name, value in which.items() if value is not None]:
        raise SamplingError(
            f"{given[0]} is {which[given[0]]!r}; expected none beside a model that is loaded: it "
            "is an option of load_trained"
        )
    settings = model.fill_settings(settings)
    all_labels = model.labels(request, seed=settings.seed)
    if progress:
        print_cost(settings)
    return draw_images(model, settings, all_labels, batch_size=batch_size, progress=progress)


def draw_images(
    model: TrainedModel, settings: Settings, labels: np.ndarray, *, batch_size: int, progress: bool
) -> np.ndarray:
    """Images of `labels` [n], uint8 [n,H,W,C], batch_size or fewer at a time on each device.

    `settings` are filled: see `TrainedModel.fill_settings`.
    """
    _, images = generate_images(
        model.generator(settings),
        model.weights.params,
        labels,
        batch_size=device_batch_size(batch_size, len(labels)) * model.mesh.size,
        progress=progress,
    )
    return images


def describe(model: TrainedModel, settings: Settings, labels: np.ndarray) -> dict:
    """What the images depend on, as JSON takes it: two runs with the same record give the same."""

    def weights_of(weights: checkpoint.Weights) -> dict:
        return {"step": weights.step, "checksum": _digest(checkpoint.checksum(weights.params))}

    return {
        "num_images": len(labels),
        "labels": _digest(labels.tolist()),
        "model": weights_of(model.weights),
        "guide": None if model.guide is None else weights_of(model.guide),
        "autoencoder": json.loads(model.config.autoencoder.to_json())
        | {"weights_sha256": model.autoencoder.weights_sha256},
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
    }


def default_path(workdir: str | Path, record: dict) -> Path:
    """WORKDIR/samples/step_STEP_DIGEST: a folder of its own for each record."""
    step = record["model"]["step"]
    return Path(workdir) / "samples" / f"step_{step:08d}_{_digest(record)}"


def print_cost(settings: Settings) -> None:
    """Says how often the velocity and the model are evaluated."""
    if jax.process_index() == 0:
        velocities, passes = settings.num_evaluations()
        print(
            f"{settings.sampler}, {settings.num_steps} steps: an image takes {velocities} "
            f"evaluations of the velocity, {passes} passes through a model"
        )


def _digest(tree) -> str:
    return f"{zlib.crc32(json.dumps(tree, sort_keys=True).encode()):08x}"


def _open_everywhere(folder: SampleFolder, record: dict) -> list[tuple[int, int]]:
    """Opens the folder in process 0 and tells all of them which images are missing.

    Raises:
        SamplingError: in every process, if the folder cannot be used.
    """
    if jax.process_count() == 1:
        folder.open(record)
        return folder.missing()
    missing, error = np.zeros(folder.num_images + 1, bool), None
    if jax.process_index() == 0:
        try:
            folder.open(record)
            for start, stop in folder.missing():
                missing[start:stop] = True
        except SamplingError as e:
            missing[-1], error = True, e
    missing = np.asarray(multihost_utils.broadcast_one_to_all(missing))
    if missing[-1]:
        raise error or SamplingError(f"process 0 cannot use {folder.path}")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], missing[:-1], [False]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _draw_missing(folder, missing, generator, model, labels, batch_size) -> None:
    """Draws what is missing; process 0 writes a shard a batch and shows the time left."""
    count = sum(stop - start for start, stop in missing)
    main = jax.process_index() == 0
    latents = model.config.autoencoder.name == "none"
    with tqdm(
        total=len(labels),
        initial=len(labels) - count,
        unit="image",
        disable=not (main and count),
        dynamic_ncols=True,
    ) as bar:
        for start, stop, x, images in draw_batches(
            generator, model.weights.params, labels, ranges=missing, batch_size=batch_size
        ):
            if not main:
                continue
            rows = np.asarray(x if latents else images)[: stop - start]
            names = ("latents", "labels") if latents else ("arr_0", "arr_1")
            folder.write(start, dict(zip(names, (rows, labels[start:stop]), strict=True)))
            bar.update(stop - start)


def _write_pictures(folder, grid: Path, model, record: dict, labels, *, save_images: bool) -> None:
    """The grid of the first images, and each image as a PNG if asked for."""
    latents = model.config.autoencoder.name == "none"
    if latents:
        logging.warning("latents, and no decoder: the pictures show three latent channels")
    captions = class_labels(labels, model.words)
    shown = []
    for index, (row, _) in enumerate(folder.images()):
        if index >= MAX_GRID_IMAGES and not save_images:
            break
        image = np.asarray(decode_pixels(preview_latents(row[None])[0])) if latents else row
        if index < MAX_GRID_IMAGES:
            shown.append(image)
        if save_images:
            metadata = record | {"index": index, "class": captions[index]}
            save_png(folder.path / "images" / f"{index:05d}.png", image, metadata)
    columns = grid_columns(len(shown), len(np.unique(labels)))
    save_png(grid, make_grid(shown, columns=columns, captions=captions[: len(shown)]), record)
