"""Strips that show what one setting does: the same noise and class in a row, a value a column."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from flowdcn_jax import samplers
from flowdcn_jax.images import make_grid
from flowdcn_jax.models.resolution import RESOLUTION_ADJUSTMENTS
from flowdcn_jax.samplers.neural_coefficients import NEURAL_COEFFICIENTS
from flowdcn_jax.sampling.classes import class_labels
from flowdcn_jax.sampling.output_folder import OutputFolder
from flowdcn_jax.sampling.run import (
    default_path,
    describe,
    draw_images,
    in_first_process,
    load_trained,
    png_metadata,
)
from flowdcn_jax.sampling.settings import SamplingError, Settings, check_number

STEPS = (2, 3, 4, 5, 8, 10)  # the paper's figure


def compare_to_png(
    workdir: str | Path,
    settings: Settings,
    *,
    kind: str,
    step: int | None = None,
    guide_workdir: str | Path | None = None,
    guide_step: int | None = None,
    classes: Sequence[str | int] | None = None,
    labels: str = "balanced",
    num_images: int = 4,
    batch_size: int = 64,
    out: str | Path | None = None,
    autoencoder: str | None = None,
    autoencoder_weights: str | Path | None = None,
) -> Path:
    """Writes compare_KIND.png: a row an image, a column a value of `kind`.

    A folder is for one kind of one set of settings; another's is refused.

    Args:
        kind: one of COMPARISONS.
        The others are `sample_to_folder`'s; `settings` holds what the columns have in common.

    Returns:
        The path of the picture.

    Raises:
        SamplingError: a value that cannot be used.
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    if kind not in COMPARISONS:
        raise SamplingError(f"compare is {kind!r}; expected one of {', '.join(COMPARISONS)}")
    check_number("num_images", num_images, minimum=1)
    check_number("batch_size", batch_size, minimum=1)
    model = load_trained(
        workdir,
        step=step,
        guide_workdir=guide_workdir,
        guide_step=guide_step,
        autoencoder=autoencoder,
        autoencoder_weights=autoencoder_weights,
    )
    settings = settings.for_model(model.config)
    columns = COMPARISONS[kind](settings, model.config)
    all_labels = model.labels(classes, num_images, order=labels, seed=settings.seed)
    record = describe(model, settings, all_labels) | {"compare": kind}
    folder = OutputFolder(Path(out) if out else default_path(workdir, record))
    with contextlib.closing(folder):
        in_first_process(lambda: folder.open(record))  # found out now, not after the work
        drawn = []
        for caption, column in columns:
            if jax.process_index() == 0:
                print(f"{kind}: {caption}")
            drawn.append(
                draw_images(model, column, all_labels, batch_size=batch_size, progress=True)
            )
        names = class_labels(all_labels, model.words)
        strip = make_grid(
            [images[row] for row in range(num_images) for images in drawn],
            columns=len(columns),
            captions=[f"{caption}, {name}" for name in names for caption, _ in columns],
        )
        picture = f"compare_{kind}.png"
        metadata = png_metadata(model, record, classes, order=labels)
        in_first_process(lambda: folder.save_png(picture, strip, metadata))
    return folder.path / picture


def _steps(settings: Settings, config: ConfigDict) -> list[tuple[str, Settings]]:
    counts = tuple(NEURAL_COEFFICIENTS) if settings.sampler == "neural" else STEPS
    return [(f"{n} steps", dataclasses.replace(settings, num_steps=n)) for n in counts]


def _samplers(settings: Settings, config: ConfigDict) -> list[tuple[str, Settings]]:
    """All that can be run with these steps and this grid; adams1 is euler."""
    columns = []
    for name in samplers.SAMPLERS:
        own_grid = settings.last_step is not None or settings.time_shift != 1
        if name == "neural" and (own_grid or settings.num_steps not in NEURAL_COEFFICIENTS):
            continue
        if name != "adams1":
            diffusion = settings.diffusion if "sde" in name else None
            column = dataclasses.replace(settings, sampler=name, diffusion=diffusion)
            columns.append((name, column))
    return columns


def _image_sizes(settings: Settings, config: ConfigDict) -> list[tuple[str, Settings]]:
    """The training's size and three with sides half as long again; the noise is another in each."""
    stride = config.autoencoder.downsampling * config.model.patch_size
    short = config.data.image_size
    long = round(1.5 * short / stride) * stride
    sizes = ((short, short), (short, long), (long, short), (long, long))
    return [(f"{h}x{w}", dataclasses.replace(settings, image_size=(h, w))) for h, w in sizes]


def _adjustments(settings: Settings, config: ConfigDict) -> list[tuple[str, Settings]]:
    if settings.image_size == (config.data.image_size,) * 2:
        raise SamplingError(
            f"image_size is that of training, {config.data.image_size}x{config.data.image_size}; "
            "expected another, or every resolution_adjustment gives the same"
        )
    columns = [
        dataclasses.replace(settings, resolution_adjustment=k) for k in RESOLUTION_ADJUSTMENTS
    ]
    return [(column.resolution_adjustment, column.for_model(config)) for column in columns]


COMPARISONS = {
    "steps": _steps,
    "samplers": _samplers,
    "image_size": _image_sizes,
    "resolution_adjustment": _adjustments,
}
