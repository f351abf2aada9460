"""Drawing images with a training run: to a folder, as sample.py does, or to an array."""

import contextlib
import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from flowdcn_jax import __version__
from flowdcn_jax.autoencoders import Autoencoder, check_fits, load_autoencoder
from flowdcn_jax.precision import compute_dtype
from flowdcn_jax.sampling.classes import class_words, make_labels, parse_classes
from flowdcn_jax.sampling.folder import SampleFolder
from flowdcn_jax.sampling.generator import (
    draw_batches,
    generate_images,
    load_weights,
    make_generator,
)
from flowdcn_jax.sampling.pictures import write_pictures
from flowdcn_jax.sampling.settings import SamplingError, Settings, check_number
from flowdcn_jax.training import checkpoint
from flowdcn_jax.training.sharding import make_mesh


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
    check_fits(decoder, config)
    guide = None
    if guide_workdir is not None or guide_step is not None:
        guide = load_weights(str(guide_workdir or workdir), guide_step, mesh)
    words = class_words(config.model.num_classes, weights.class_names)
    return TrainedModel(mesh, weights, guide, decoder, words)


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
    path = Path(out) if out else default_path(workdir, record)
    folder = SampleFolder(path, num_images, _stored_rows(model, settings))

    with contextlib.closing(folder):
        missing = _open_everywhere(folder, record)
        print_cost(settings)
        per_device = min(batch_size, math.ceil(num_images / model.mesh.size))
        _draw_missing(folder, missing, generator, model, all_labels, per_device * model.mesh.size)
        in_first_process(folder.join)
        metadata = png_metadata(model, record, classes, order=labels)
        pictures = (folder, all_labels, model.words, metadata)
        in_first_process(lambda: write_pictures(*pictures, save_images=save_images))
    return folder.grid


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

    def network(weights: checkpoint.Weights) -> dict:
        return {
            "step": weights.step,
            "checksum": _digest(checkpoint.checksum(weights.params)),
            "config": _resolved(weights.config.model),
            "image_size": weights.config.data.image_size,  # resolution adjustments start from it
        }

    decoder = _resolved(model.config.autoencoder)
    decoder.pop("weights", None)  # where they lie; their digest says which they are
    return {
        "num_images": len(labels),
        "labels": _digest(labels.tolist()),
        "model": network(model.weights),
        "guide": None if model.guide is None else network(model.guide),
        "autoencoder": decoder
        | {
            "weights_sha256": model.autoencoder.weights_sha256,
            "scale": model.autoencoder.scale,
            "shift": model.autoencoder.shift,
        },
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
    }


def _resolved(section: ConfigDict) -> dict:
    """A section of a config with the dtype that "auto" stands for on these devices."""
    dtype = np.dtype(compute_dtype(section.dtype)).name
    return json.loads(section.to_json()) | {"dtype": dtype}


def png_metadata(
    model: TrainedModel, record: dict, classes: Sequence[str | int] | None, *, order: str
) -> dict:
    """What PNGs say of themselves: their record, the classes asked for, and who made them."""
    asked = model.config.sampling.classes if classes is None else [str(name) for name in classes]
    request = {"classes": list(asked), "labels": order}
    return record | {"request": request, "flowdcn_jax": __version__}


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


def in_first_process(action: Callable[[], object]) -> None:
    """Calls `action` in process 0, and raises its SamplingError in every process.

    All processes call it at the same place; the others wait.
    """
    error = None
    if jax.process_index() == 0:
        try:
            action()
        except SamplingError as e:
            error = e
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
    if failed:
        raise error or SamplingError("process 0 had to stop; its own message says why")


def _open_everywhere(folder: SampleFolder, record: dict) -> list[tuple[int, int]]:
    """Opens the folder in process 0 and tells all of them which images are missing.

    Raises:
        SamplingError: in every process, if the folder cannot be used.
    """
    in_first_process(lambda: folder.open(record))
    if jax.process_count() == 1:
        return folder.missing()
    missing = np.zeros(folder.num_images, bool)
    if jax.process_index() == 0:
        for start, stop in folder.missing():
            missing[start:stop] = True
    missing = np.asarray(multihost_utils.broadcast_one_to_all(missing))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _stored_rows(model: TrainedModel, settings: Settings) -> dict[str, jax.ShapeDtypeStruct]:
    """What the files hold of each image: latents where there is no decoder."""
    config = model.config
    sides = (side // config.autoencoder.downsampling for side in settings.image_size)
    x = jax.ShapeDtypeStruct((1, *sides, config.model.in_channels), np.float32)
    label = jax.ShapeDtypeStruct((), np.int32)
    if config.autoencoder.name == "none":
        return {"latents": jax.ShapeDtypeStruct(x.shape[1:], x.dtype), "labels": label}
    image = jax.eval_shape(model.autoencoder.decode, model.autoencoder.params, x)
    return {"arr_0": jax.ShapeDtypeStruct(image.shape[1:], np.uint8), "arr_1": label}


def _draw_missing(folder, missing, generator, model, labels, batch_size) -> None:
    """Draws what is missing; process 0 writes a shard a batch and shows the time left."""
    count = sum(stop - start for start, stop in missing)
    main = jax.process_index() == 0
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
            rows = x if "latents" in folder.rows else images
            if main:
                rows = np.asarray(rows)[: stop - start]
            in_first_process(functools.partial(folder.write, start, rows, labels[start:stop]))
            bar.update(stop - start)
