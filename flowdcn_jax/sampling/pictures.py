"""What people look at: a run's grid, its images as PNGs, and strips that compare.

A strip shows what one option does: the same noise and class in a row, a value a column.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from flowdcn_jax import samplers
from flowdcn_jax.autoencoders import decode_pixels, preview_latents
from flowdcn_jax.images import grid_columns, make_grid
from flowdcn_jax.models import takes_second_time
from flowdcn_jax.models.resolution import RESOLUTION_ADJUSTMENTS
from flowdcn_jax.samplers.neural_coefficients import NEURAL_COEFFICIENTS
from flowdcn_jax.sampling.classes import class_labels
from flowdcn_jax.sampling.folder import IMAGES_FOLDER, SampleFolder
from flowdcn_jax.sampling.generator import count_evaluations, fill_settings
from flowdcn_jax.sampling.settings import SamplingError, Settings

MAX_GRID_IMAGES = 100  # the grid shows the first ones
STEPS = (2, 3, 4, 5, 8, 10)  # columns of a strip: the paper's figure
JUMPS = (1, 2, 4, 8)  # of a model of mean velocities


def write_pictures(
    folder: SampleFolder,
    labels: np.ndarray,
    words: tuple[tuple[str, ...], ...] | None,
    metadata: dict,
    *,
    save_images: bool,
) -> None:
    """Writes grid.png and, if asked for, images/00000.png ...; those that are there stay.

    Args:
        folder: holds samples.npz; latents are shown as three of their channels.
        labels: [num_images], the class of each image.
        words: what each class is called; see `class_words`.
        metadata: of every PNG; an image's own also gives its index and class.
        save_images: write each image.

    Raises:
        SamplingError: the disk is full, the folder cannot be written to, or samples.npz is damaged.
    """
    latents = "latents" in folder.rows
    names = [f"{IMAGES_FOLDER}/{index:05d}.png" for index in range(len(labels))]
    there = {f"{IMAGES_FOLDER}/{path.name}" for path in (folder.path / IMAGES_FOLDER).glob("*.png")}
    wanted = {index for index, name in enumerate(names) if save_images and name not in there}
    grid_images = 0 if folder.grid.exists() else min(len(labels), MAX_GRID_IMAGES)
    count = max([grid_images, *(index + 1 for index in wanted)])
    if latents and count:
        logging.warning("latents, and no decoder: the pictures show three latent channels")
    captions = class_labels(labels, words)
    shown = []
    with tqdm(
        total=len(labels),
        initial=len(labels) - len(wanted),
        unit="PNG",
        disable=not wanted,
        dynamic_ncols=True,
    ) as bar:
        for index, (row, _) in enumerate(itertools.islice(folder.images(), count)):
            if index >= grid_images and index not in wanted:
                continue
            image = np.asarray(decode_pixels(preview_latents(row[None])[0])) if latents else row
            if index < grid_images:
                shown.append(image)
            if index in wanted:
                own = {
                    "index": index,
                    "class": int(labels[index]),
                    "class_name": captions[index] if words else None,
                }
                folder.save_png(names[index], image, metadata | own)
                bar.update()
    if shown:
        columns = grid_columns(len(shown), len(np.unique(labels)))
        grid = make_grid(shown, columns=columns, captions=captions[: len(shown)])
        folder.save_png(folder.grid.name, grid, metadata)


class Comparison(NamedTuple):
    """A field of Settings that the columns go through."""

    field: str
    # (settings without the field, config) -> ({name: settings of a column}, [what is left out])
    columns: Callable[[Settings, ConfigDict], tuple[dict[str, Settings], list[str]]]


def strip_columns(
    kind: str, settings: Settings, config: ConfigDict
) -> tuple[dict[str, Settings], list[str]]:
    """({name: filled settings of a column}, [what is left out, in words]).

    Args:
        kind: one of COMPARISONS.
        settings: what the columns have in common; what they differ in is None.
        config: of the run.

    Raises:
        SamplingError: values that cannot be used, or that make all columns alike.
    """
    field, make_columns = COMPARISONS[kind]
    own = getattr(settings, field)
    if own is not None:
        raise SamplingError(
            f"{field} is {own!r}; expected none, since compare={kind} goes through it"
        )
    columns, left_out = make_columns(settings, config)
    return {name: fill_settings(column, config) for name, column in columns.items()}, left_out


def strip_captions(columns: dict[str, Settings], class_names: Sequence[str]) -> list[str]:
    """What to write under each picture of a strip, row by row."""
    return [
        f"{name}\n{evaluations_text(column)}, {class_name}"
        for class_name in class_names
        for name, column in columns.items()
    ]


def evaluations_text(settings: Settings) -> str:
    """How often filled settings evaluate the velocity."""
    return f"{count_evaluations(settings)[0]} evals"


def _steps(settings: Settings, config: ConfigDict) -> tuple[dict[str, Settings], list[str]]:
    counts = JUMPS if takes_second_time(config.model) else STEPS
    counts = tuple(NEURAL_COEFFICIENTS) if settings.sampler == "neural" else counts
    return {f"{n} steps": dataclasses.replace(settings, num_steps=n) for n in counts}, []


def _samplers(settings: Settings, config: ConfigDict) -> tuple[dict[str, Settings], list[str]]:
    """All that can be run with these steps and this grid. The diffusion is the SDEs'."""
    if takes_second_time(config.model):
        raise SamplingError(
            "compare is 'samplers'; expected another comparison, since a model of mean velocities "
            "has the sampler mean_flow alone"
        )
    columns, left_out = {}, ["adams1 is left out: it is euler"]
    for name in samplers.SAMPLERS:
        if name == "adams1" or name in samplers.OF_MEAN_VELOCITIES:
            continue
        diffusion = settings.diffusion if "sde" in name else None
        column = dataclasses.replace(settings, sampler=name, diffusion=diffusion)
        try:
            columns[name] = fill_settings(column, config)
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
