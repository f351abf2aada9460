"""Drawing images with a training run: to a folder, as sample.py does, or to an array."""

import contextlib
import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from flowdcn_jax import __version__
from flowdcn_jax.precision import compute_dtype
from flowdcn_jax.sampling.classes import class_texts
from flowdcn_jax.sampling.folder import SampleFolder
from flowdcn_jax.sampling.generator import device_batch_size, draw_batches, generate_images
from flowdcn_jax.sampling.pictures import write_pictures
from flowdcn_jax.sampling.request import Request
from flowdcn_jax.sampling.settings import SamplingError, Settings
from flowdcn_jax.sampling.trained_model import TrainedModel, load_trained
from flowdcn_jax.training import checkpoint


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
    folder = SampleFolder(path, len(labels), _stored_rows(model, settings))

    with contextlib.closing(folder):
        missing = _open_everywhere(folder, record)
        print_cost(settings)
        batch_size = device_batch_size(request.batch_size, len(labels)) * model.mesh.size
        _draw_missing(folder, missing, generator, model, labels, batch_size)
        in_first_process(folder.join)
        pictures = (folder, labels, model.words, png_metadata(model, record, request))
        in_first_process(lambda: write_pictures(*pictures, save_images=save_images))
    return folder.grid


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


def png_metadata(model: TrainedModel, record: dict, request: Request) -> dict:
    """What PNGs say of themselves: their record, the classes asked for, and who made them."""
    asked = request.classes
    classes = list(model.config.sampling.classes) if asked is None else class_texts(asked)
    request_record = {"classes": classes, "labels": request.labels}
    return record | {"request": request_record, "flowdcn_jax": __version__}


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
    if config.autoencoder.name == "preview":
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
