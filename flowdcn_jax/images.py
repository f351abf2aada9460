"""Pictures for people: grids and PNGs."""

from pathlib import Path

import numpy as np
from PIL import Image

from flowdcn_jax.files import atomic_write

MIN_GRID_SIDE = 64  # pixels: smaller images are enlarged, or nobody could see them


def make_grid(images: np.ndarray, *, columns: int, gap: int = 2) -> np.ndarray:
    """Images [n,H,W,C] uint8 (C 1 or 3), row by row, as one [H',W',3] picture on white.

    Images with a side below MIN_GRID_SIDE are enlarged by a whole factor, without smoothing.
    """
    count, height, width, channels = images.shape
    factor = max(1, -(-MIN_GRID_SIDE // min(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    if channels == 1:
        images = images.repeat(3, axis=3)
    height, width = height * factor + gap, width * factor + gap
    rows = -(-count // columns)
    grid = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * height + gap, (index % columns) * width + gap
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return grid


def grid_columns(num_images: int, num_classes: int) -> int:
    """A column a class where that fits a screen, else a square."""
    if 2 <= num_classes <= 16 and num_images > num_classes:
        return num_classes
    return max(1, round(num_images**0.5))


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes a uint8 [H,W] / [H,W,1] / [H,W,3] array, whole or not at all."""
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, format="PNG", optimize=True)
