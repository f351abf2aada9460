"""Strips that show what one setting does: the same noise and class in a row, a value a column."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from flowdcn_jax import samplers
from flowdcn_jax.images import make_grid
from flowdcn_jax.models.resolution import RESOLUTION_ADJUSTMENTS
from flowdcn_jax.samplers.neural_coefficients import NEURAL_COEFFICIENTS
from flowdcn_jax.sampling.classes import class_labels
from flowdcn_jax.sampling.folder import OutputFolder
from flowdcn_jax.sampling.request import Request
from flowdcn_jax.sampling.run import (
    default_path,
    describe,
    draw_images,
    in_first_process,
    png_metadata,
)
from flowdcn_jax.sampling.settings import SamplingError, Settings
from flowdcn_jax.sampling.trained_model import TrainedModel

STEPS = (2, 3, 4, 5, 8, 10)  # the paper's figure
NUM_IMAGES = 4  # rows, by default


def compare_to_png(
    model: TrainedModel,
    settings: Settings,
    request: Request,
    *,
    kind: str,
    out: str | Path | None = None,
) -> Path:
    """Writes compare_KIND.png: a row an image, a column a value of `kind`.

    A folder is for one kind of one set of settings; another's is refused.

    Args:
        model: of `load_trained`.
        settings: what the columns have in common; what they differ in is None.
        request: which images; NUM_IMAGES unless it says how many.
        kind: one of COMPARISONS.
        out: the folder; None: one in WORKDIR/samples for these settings.

    Returns:
        The path of the picture.

    Raises:
        SamplingError: a value that cannot be used.
        flowdcn_jax.runs.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    if kind not in COMPARISONS:
        raise SamplingError(f"compare is {kind!r}; expected one of {', '.join(COMPARISONS)}")
    comparison = COMPARISONS[kind]
    own = getattr(settings, comparison.field)
    if own is not None:
        raise SamplingError(
            f"{comparison.field} is {own!r}; expected none, since compare={kind} goes through it"
        )
    columns, left_out = comparison.columns(settings, model.config)
    columns = {name: model.fill_settings(column) for name, column in columns.items()}
    first = next(iter(columns.values()))
    if request.num_images is None:
        request = dataclasses.replace(request, num_images=NUM_IMAGES)
    labels = model.labels(request, seed=first.seed)
    record = describe(model, first, labels) | {
        "compare": kind,
        "settings": {name: dataclasses.asdict(column) for name, column in columns.items()},
    }
    path = Path(out) if out else default_path(model.source.workdir, record)
    folder, picture = OutputFolder(path), f"compare_{kind}.png"
    with contextlib.closing(folder):
        in_first_process(lambda: folder.open(record))  # found out now, not after the work
        main = jax.process_index() == 0
        if main:
            for line in left_out:
                print(f"{kind}: {line}")
        drawn, evaluations = [], {}
        for name, column in columns.items():
            evaluations[name] = f"{column.num_evaluations()[0]} evals"
            if main:
                print(f"{kind}: {name}, {evaluations[name]}")
            drawn.append(
                draw_images(model, column, labels, batch_size=request.batch_size, progress=True)
            )
        class_names = class_labels(labels, model.words)
        strip = make_grid(
            [images[row] for row in range(len(labels)) for images in drawn],
            columns=len(columns),
            captions=[
                f"{name}\n{evaluations[name]}, {row}" for row in class_names for name in columns
            ],
        )
        metadata = png_metadata(model, record, request)
        in_first_process(lambda: folder.save_png(picture, strip, metadata))
    return folder.path / picture


class Comparison(NamedTuple):
    """A field of Settings that the columns go through."""

    field: str
    # (settings without the field, config) -> ({name: settings of a column}, [what is left out])
    columns: Callable[[Settings, ConfigDict], tuple[dict[str, Settings], list[str]]]


def _steps(settings: Settings, config: ConfigDict) -> tuple[dict[str, Settings], list[str]]:
    counts = tuple(NEURAL_COEFFICIENTS) if settings.sampler == "neural" else STEPS
    return {f"{n} steps": dataclasses.replace(settings, num_steps=n) for n in counts}, []


def _samplers(settings: Settings, config: ConfigDict) -> tuple[dict[str, Settings], list[str]]:
    """All that can be run with these steps and this grid. The diffusion is the SDEs'."""
    columns, left_out = {}, ["adams1 is left out: it is euler"]
    for name in samplers.SAMPLERS:
        if name == "adams1":
            continue
        diffusion = settings.diffusion if "sde" in name else None
        column = dataclasses.replace(settings, diffusion=diffusion)
        try:
            columns[name] = dataclasses.replace(column, sampler=name).for_model(config)
        except SamplingError as error:
            if name != "neural":  # the only one that does not take every grid
                raise
            left_out.append(f"neural is left out: {error}")
    return columns, left_out


def _image_sizes(settings: Settings, config: ConfigDict) -> tuple[dict[str, Settings], list[str]]:
    """The training's size and three with sides half as long again; the noise is another in each."""
    stride = config.autoencoder.downsampling * config.model.patch_size
    short = config.data.image_size
    long = round(1.5 * short / stride) * stride
    sizes = ((short, short), (short, long), (long, short), (long, long))
    return {f"{h}x{w}": dataclasses.replace(settings, image_size=(h, w)) for h, w in sizes}, []


def _adjustments(settings: Settings, config: ConfigDict) -> tuple[dict[str, Settings], list[str]]:
    if settings.image_size in (None, (config.data.image_size,) * 2):
        raise SamplingError(
            f"image_size is that of training, {config.data.image_size}x{config.data.image_size}; "
            "expected another, or every resolution_adjustment gives the same"
        )
    kinds = RESOLUTION_ADJUSTMENTS
    return {k: dataclasses.replace(settings, resolution_adjustment=k) for k in kinds}, []


COMPARISONS = {
    "steps": Comparison("num_steps", _steps),
    "samplers": Comparison("sampler", _samplers),
    "image_size": Comparison("image_size", _image_sizes),
    "resolution_adjustment": Comparison("resolution_adjustment", _adjustments),
}
