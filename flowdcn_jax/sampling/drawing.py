"""Drawing with a trained model: to a folder, as sample.py does, to an array, or as a strip."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flowdcn_jax.images import make_grid
from flowdcn_jax.options import takes_options
from flowdcn_jax.runs.processes import in_first_process
from flowdcn_jax.sampling.classes import class_labels
from flowdcn_jax.sampling.folder import OutputFolder, SampleFolder
from flowdcn_jax.sampling.generator import count_evaluations, draw_batches
from flowdcn_jax.sampling.named_model import with_published
from flowdcn_jax.sampling.pictures import (
    COMPARISONS,
    evaluations_text,
    strip_captions,
    strip_columns,
    write_pictures,
)
from flowdcn_jax.sampling.settings import (
    COMPARED_IMAGES,
    ModelChoice,
    Output,
    Request,
    SamplingError,
    Settings,
)
from flowdcn_jax.sampling.trained_model import TrainedModel, digest, load_trained
from flowdcn_jax.version import __version__


@takes_options
def generate(
    model: TrainedModel | str | Path,
    request: Request,
    settings: Settings,
    choice: ModelChoice,
    *,
    progress: bool = True,
) -> np.ndarray:
    """Images of a trained model, uint8 [num_images,H,W,C]: those that sample.py writes.

    Latents without a decoder give previews.

    Args:
        model: the workdir of a training run, or the name of published weights; or `load_trained`'s
            model, which keeps weights and compiled programs, so that the next call starts at once.
        progress: show a bar, and how often the model is evaluated.
        OPTIONS

    Raises:
        flowdcn_jax.errors.UserError: a value, file or folder that cannot be used.
    """
    model = _loaded(model, choice)
    settings = model.fill_settings(settings)
    labels = model.labels(request, seed=settings.seed)
    if progress:
        _print_cost(settings)
    return model.draw(settings, labels, batch_size=request.batch_size, progress=progress)


@takes_options
def sample_to_folder(
    model: TrainedModel | str | Path,
    request: Request,
    settings: Settings,
    choice: ModelChoice,
    output: Output,
) -> Path:
    """Draws images to a folder, or a strip that compares; what sample.py does.

    A folder is for the images, or the strip, of one set of settings. A call goes on where an
    earlier one stopped. Every process of a distributed job calls it; the first one writes.

    Args:
        model: the workdir of a training run, the name of published weights, or `load_trained`'s
            model.
        OPTIONS

    Returns:
        The path of the grid or of the strip, in the folder.

    Raises:
        flowdcn_jax.errors.UserError: a value, file or folder that cannot be used.
    """
    model = _loaded(model, choice)
    if output.compare is not None:
        return _write_strip(model, request, settings, output)
    return _write_images(model, request, settings, output)


def _loaded(model: TrainedModel | str | Path, choice: ModelChoice) -> TrainedModel:
    if not isinstance(model, TrainedModel):
        return load_trained(model, **vars(choice))
    for name, value in vars(choice).items():
        if value is not None:
            raise SamplingError(
                f"{name} is {value!r}; expected none beside a model that is loaded: it is an "
                "option of load_trained"
            )
    return model


def _write_images(
    model: TrainedModel, request: Request, settings: Settings, output: Output
) -> Path:
    """samples.npz, grid.png and perhaps images/; returns the grid's path."""
    settings = model.fill_settings(settings)
    labels = model.labels(request, seed=settings.seed)
    generator = model.generator(settings)
    record = image_record(model, labels, settings)
    path = output.out or find_folder(model.samples, record)
    folder = SampleFolder(path, len(labels), stored_rows(model, settings))
    with _opened(folder, record):
        missing = _missing_everywhere(folder)
        _print_cost(settings)
        batch_size = model.round_size(len(labels), batch_size=request.batch_size)
        batches = draw_batches(
            generator, model.weights.params, labels, ranges=missing, batch_size=batch_size
        )
        with contextlib.closing(batches):
            for start, stop, x, images in batches:
                rows = x if "latents" in folder.rows else images
                if jax.process_index() == 0:
                    rows = np.asarray(rows)[: stop - start]
                _in_first(functools.partial(folder.write, start, rows, labels[start:stop]))
        _in_first(folder.join)
        pictures = (folder, labels, model.words, _png_metadata(record, request))
        _in_first(lambda: write_pictures(*pictures, save_images=output.save_images))
    return folder.grid


def _write_strip(model: TrainedModel, request: Request, settings: Settings, output: Output) -> Path:
    """compare_KIND.png: a row an image, a column a value; returns its path."""
    kind = output.compare
    through = COMPARISONS[kind].field
    settings = with_published(settings, model.published, through=through)
    columns, left_out = strip_columns(kind, settings, model.config)
    columns = {name: model.fill_settings(column) for name, column in columns.items()}
    if request.num_images is None:
        request = dataclasses.replace(request, num_images=COMPARED_IMAGES)
    labels = model.labels(request, seed=next(iter(columns.values())).seed)
    of_columns = {name: dataclasses.asdict(column) for name, column in columns.items()}
    record = make_record(model, labels, {"settings": of_columns, "compare": kind})
    path = output.out or find_folder(model.samples, record)
    folder, picture = OutputFolder(path), f"compare_{kind}.png"
    show = print if jax.process_index() == 0 else lambda line: None
    for line in left_out:
        show(f"{kind}: {line}")
    with _opened(folder, record):  # found out now, not after the work
        drawn = []
        for name, column in columns.items():
            show(f"{kind}: {name}, {evaluations_text(column)}")
            drawn.append(model.draw(column, labels, batch_size=request.batch_size))
        strip = make_grid(
            [images[row] for row in range(len(labels)) for images in drawn],
            columns=len(columns),
            captions=strip_captions(columns, class_labels(labels, model.words)),
        )
        metadata = _png_metadata(record, request)
        _in_first(lambda: folder.save_png(picture, strip, metadata))
    return folder.path / picture


def image_record(model: TrainedModel, labels: np.ndarray, settings: Settings) -> dict:
    """`make_record` of images that are drawn with filled settings."""
    return make_record(model, labels, {"settings": dataclasses.asdict(settings)})


def make_record(model: TrainedModel, labels: np.ndarray, settings: dict[str, Any]) -> dict:
    """What images depend on, as JSON takes it: two runs with the same record give the same."""
    record = {
        "num_images": len(labels),
        "labels": digest(labels.tolist()),
        **model.record,
        **settings,
    }
    return json.loads(json.dumps(record))  # tuples become lists, as in files


def find_folder(samples: Path, record: dict[str, Any]) -> Path:
    """The folder in `samples` that has this record; else a new one, step_STEP_DIGEST."""
    step = f"step_{record['model']['step']:08d}"
    for path in sorted(samples.glob(f"{step}_*")):  # digests of older versions' are others
        with contextlib.suppress(SamplingError):  # a damaged one
            if OutputFolder(path).read_record() == record:
                return path
    return samples / f"{step}_{digest(record)}"


def _print_cost(settings: Settings) -> None:
    """Says how often the velocity and the model are evaluated."""
    if jax.process_index() == 0:
        velocities, passes = count_evaluations(settings)
        print(
            f"{settings.sampler}, {settings.num_steps} steps: an image takes {velocities} "
            f"evaluations of the velocity, {passes} passes through a model"
        )


_in_first = functools.partial(in_first_process, error=SamplingError)


@contextlib.contextmanager
def _opened(folder: OutputFolder, record: dict[str, Any]) -> Iterator[None]:
    """Opens the folder in process 0, and closes it at the end.

    Raises:
        SamplingError: in every process, if the folder cannot be used.
    """
    with contextlib.closing(folder):
        _in_first(lambda: folder.open(record))
        yield


def _missing_everywhere(folder: SampleFolder) -> list[tuple[int, int]]:
    """Which images are missing, as process 0 finds."""
    if jax.process_count() == 1:
        return folder.missing()
    missing = np.zeros(folder.num_images, bool)
    if jax.process_index() == 0:
        for start, stop in folder.missing():
            missing[start:stop] = True
    missing = np.asarray(multihost_utils.broadcast_one_to_all(missing))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def stored_rows(model: TrainedModel, settings: Settings) -> dict[str, jax.ShapeDtypeStruct]:
    """What the files hold of each image: latents where there is no decoder."""
    config = model.config
    sides = (side // config.autoencoder.downsampling for side in settings.image_size)
    x = jax.ShapeDtypeStruct((1, *sides, config.model.in_channels), np.float32)
    label = jax.ShapeDtypeStruct((), np.int32)
    if config.autoencoder.name == "preview":
        return {"latents": jax.ShapeDtypeStruct(x.shape[1:], x.dtype), "labels": label}
    image = jax.eval_shape(model.autoencoder.decode, model.autoencoder.params, x)
    return {"arr_0": jax.ShapeDtypeStruct(image.shape[1:], np.uint8), "arr_1": label}


def _png_metadata(record: dict[str, Any], request: Request) -> dict[str, Any]:
    """What PNGs say of themselves: their record, the classes asked for, and who made them."""
    asked = {"classes": list(request.classes or ()), "labels": request.labels}  # none: all
    return record | {"request": asked, "flowdcn_jax": __version__}
