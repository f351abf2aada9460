"""The pictures of a run: a grid of the first images, and each image as a PNG."""

import itertools
import logging

import numpy as np
from tqdm import tqdm

from flowdcn_jax.autoencoders import decode_pixels, preview_latents
from flowdcn_jax.images import grid_columns, make_grid
from flowdcn_jax.sampling.classes import class_labels
from flowdcn_jax.sampling.folder import IMAGES_FOLDER, SampleFolder

MAX_GRID_IMAGES = 100  # the grid shows the first ones


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
