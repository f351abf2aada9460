"""Drawing images with a training run: to a folder, as sample.py does, or to an array."""

import dataclasses
import json
import logging
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from flowdcn_jax.autoencoders import (
    Autoencoder,
    check_fits,
    decode_pixels,
    load_autoencoder,
    preview_latents,
)
from flowdcn_jax.data.manifest import Encoder, find_encoder
from flowdcn_jax.images import grid_columns, make_grid, save_png
from flowdcn_jax.sampling.classes import class_labels, class_words, make_labels, parse_classes
from flowdcn_jax.sampling.folder import SampleFolder
from flowdcn_jax.sampling.generator import (
    draw_batches,
    generate_images,
    load_weights,
    make_generator,
)
from flowdcn_jax.sampling.settings import SamplingError, Settings, check_number
from flowdcn_jax.training import checkpoint
from flowdcn_jax.training.sharding import make_mesh

MAX_GRID_IMAGES = 100  # the grid shows the first ones


class TrainedModel(NamedTuple):
    """What a workdir holds for sampling, on the devices."""

    mesh: Mesh
    weights: checkpoint.Weights
    guide: checkpoint.Weights | None  # the weaker model of autoguidance
    autoencoder: Autoencoder
    words: tuple[tuple[str, ...], ...] | None  # of each class

    @property
    def config(self) -> ConfigDict:
        return self.weights.config

    def labels(
        self, classes: Sequence[str | int] | None, num_images: int, *, order: str, seed: int
    ) -> np.ndarray:
        """Labels [num_images] of the classes asked for; of the config's classes for None.

        Raises:
            SamplingError: an unknown class or order.
        """
        num_classes = self.config.model.num_classes
        chosen = tuple(self.config.sampling.classes)
        if classes is not None:
            chosen = parse_classes([str(name) for name in classes], num_classes, self.words)
        return make_labels(order, tuple(chosen), num_images, num_classes, seed=seed)


def load_trained(
    workdir: str | Path,
    *,
    step: int | None = None,
    guide_workdir: str | Path | None = None,
    guide_step: int | None = None,
    autoencoder: str | None = None,
    autoencoder_weights: str | Path | None = None,
    mesh: Mesh | None = None,
) -> TrainedModel:
    """The EMA weights of a run, and of a guide if one is named, on every device of `mesh`.

    Args:
        workdir: the --workdir of the training run.
        step: its checkpoint; None: the newest.
        guide_workdir: the run of the guide; None: `workdir`, if guide_step is given.
        guide_step: the guide's checkpoint; None: the newest, if guide_workdir is given.
        autoencoder: what decodes; None: the run's.
        autoencoder_weights: its file or folder; None: the run's, if the run names this autoencoder.
        mesh: all devices of all processes by default.

    Raises:
        flowdcn_jax.errors.UserError: the autoencoder's weights are not there, or do not fit.
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    mesh = make_mesh() if mesh is None else mesh
    weights = load_weights(str(workdir), step, mesh)
    config = _with_autoencoder(weights.config, autoencoder, autoencoder_weights)
    weights = weights._replace(config=config)
    decoder = load_autoencoder(config.autoencoder)
    check_fits(decoder, config, origin=_encoder(weights))
    guide = None
    if guide_workdir is not None or guide_step is not None:
        guide = load_weights(str(guide_workdir or workdir), guide_step, mesh)
    words = class_words(config.model.num_classes, weights.class_names)
    return TrainedModel(mesh, weights, guide, decoder, words)


def _encoder(weights: checkpoint.Weights) -> Encoder | None:
    """What encoded the latents that a run was trained on; None: not known, or pixels."""
    identity = weights.data_identity
    return find_encoder(identity) if identity and "settings" in identity else None


def _with_autoencoder(config: ConfigDict, name: str | None, weights) -> ConfigDict:
    """A copy of a run's config that decodes with another autoencoder, or with weights elsewhere.

    Another `name` has its own weights: those of the config are then left out.
    """
    config = config.copy_and_resolve_references()
    if name not in (None, config.autoencoder.name):
        config.autoencoder.update(name=name, weights=None)
    if weights is not None:
        config.autoencoder.weights = str(weights)
    return config


def sample_to_folder(
    workdir: str | Path,
    settings: Settings,
    *,
    step: int | None = None,
    guide_workdir: str | Path | None = None,
    guide_step: int | None = None,
    classes: Sequence[str | int] | None = None,
    labels: str = "balanced",
    num_images: int = 64,
    batch_size: int = 64,
    out: str | Path | None = None,
    save_images: bool = False,
    autoencoder: str | None = None,
    autoencoder_weights: str | Path | None = None,
    mesh: Mesh | None = None,
) -> Path:
    """Draws images to a folder, going on where an earlier call stopped; what sample.py does.

    Every process of a distributed job calls it; the first one writes.

    Args:
        workdir: the --workdir of the training run.
        settings: how to sample.
        step, guide_workdir, guide_step, autoencoder, autoencoder_weights, mesh: see `load_trained`.
        classes: names and numbers; ["all"]; None: the config's sampling.classes.
        labels: "balanced", the classes in turn, or "random".
        num_images: in all.
        batch_size: the largest number of images that a device draws at a time.
        out: the folder; None: one in WORKDIR/samples for these settings.
        save_images: write each image as a PNG too.

    Returns:
        The path of the grid, in the folder.

    Raises:
        SamplingError: a value that cannot be used, or a folder with another run's images.
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    check_number("num_images", num_images, minimum=1)
    check_number("batch_size", batch_size, minimum=1)
    model = load_trained(
        workdir,
        step=step,
        guide_workdir=guide_workdir,
        guide_step=guide_step,
        autoencoder=autoencoder,
        autoencoder_weights=autoencoder_weights,
        mesh=mesh,
    )
    settings = settings.for_model(model.config)
    generator = make_generator(
        model.config, model.mesh, settings, guide=model.guide, autoencoder=model.autoencoder
    )
    all_labels = model.labels(classes, num_images, order=labels, seed=settings.seed)
    record = describe(model, settings, all_labels)
    folder = SampleFolder(Path(out) if out else default_path(workdir, record), num_images)

    missing = _open_everywhere(folder, record)
    print_cost(settings)
    per_device = min(batch_size, math.ceil(num_images / model.mesh.size))
    _draw_missing(folder, missing, generator, model, all_labels, per_device * model.mesh.size)
    grid = folder.path / "grid.png"
    if jax.process_index() == 0:
        folder.join()
        _write_pictures(folder, grid, model, record, all_labels, save_images=save_images)
    return grid


def generate(
    workdir: str | Path,
    *,
    step: int | None = None,
    guide_workdir: str | Path | None = None,
    guide_step: int | None = None,
    classes: Sequence[str | int] | None = None,
    labels: str = "balanced",
    num_images: int = 64,
    batch_size: int = 64,
    progress: bool = True,
    autoencoder: str | None = None,
    autoencoder_weights: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    sampler: str = "euler",
    num_steps: int = 50,
    last_step: float | None = None,
    time_shift: float = 1.0,
    diffusion: str | None = None,
    guidance: float = 1.375,
    guidance_channels: str = "all",
    guidance_interval: tuple[float, float] | None = None,
    guidance_schedule: str = "constant",
    resolution_adjustment: str = "none",
    seed: int = 0,
) -> np.ndarray:
    """Images of a trained model, uint8 [num_images,H,W,C]: those that sample.py writes.

    The arguments are sample.py's flags, see `sample_to_folder` and `Settings`. Latents without a
    decoder give previews.

    Raises:
        SamplingError: a value that cannot be used.
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    check_number("num_images", num_images, minimum=1)
    check_number("batch_size", batch_size, minimum=1)
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
    model = load_trained(
        workdir,
        step=step,
        guide_workdir=guide_workdir,
        guide_step=guide_step,
        autoencoder=autoencoder,
        autoencoder_weights=autoencoder_weights,
    )
    all_labels = model.labels(classes, num_images, order=labels, seed=seed)
    return draw_images(model, settings, all_labels, batch_size=batch_size, progress=progress)


def draw_images(
    model: TrainedModel, settings: Settings, labels: np.ndarray, *, batch_size: int, progress: bool
) -> np.ndarray:
    """Images of `labels` [n], uint8 [n,H,W,C], batch_size or fewer at a time on each device.

    Raises:
        SamplingError: settings that do not fit the model.
    """
    generator = make_generator(
        model.config, model.mesh, settings, guide=model.guide, autoencoder=model.autoencoder
    )
    per_device = min(batch_size, math.ceil(len(labels) / model.mesh.size))
    _, images = generate_images(
        generator,
        model.weights.params,
        labels,
        batch_size=per_device * model.mesh.size,
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
