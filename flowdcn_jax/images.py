"""Pictures for people: grids, captions and PNGs."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from flowdcn_jax.files import atomic_write

MIN_GRID_SIDE = 64  # pixels: smaller images are enlarged, or nobody could see them
CAPTION_SIZE = 11  # pixels: height of the letters
CAPTION_HEIGHT = 16  # pixels that a caption adds to a picture
PNG_KEY = "flowdcn_jax"  # of the metadata


def make_grid(
    images: Sequence[np.ndarray],
    *,
    columns: int,
    gap: int = 2,
    captions: Sequence[str] | None = None,
) -> np.ndarray:
    """Images, row by row, as one [H',W',3] picture on white.

    Args:
        images: uint8 [H,W,C] each, C 1 or 3; sizes may differ. If a side is below MIN_GRID_SIDE all
            are enlarged by one whole factor, without smoothing.
        columns: images a row.
        gap: white pixels between images.
        captions: a text under each image, of one line or several. For long lines columns get up to
            twice as wide as the widest image; then they are cut off.
    """
    side = min(min(image.shape[:2]) for image in images)
    factor = max(1, -(-MIN_GRID_SIDE // side))
    images = [image.repeat(factor, axis=0).repeat(factor, axis=1) for image in images]
    texts = [caption.split("\n") for caption in captions or ()]
    below = CAPTION_HEIGHT * max(map(len, texts), default=0)
    height = max(image.shape[0] for image in images) + below + gap
    width = max(image.shape[1] for image in images)
    if texts:
        widest = max(int(_font().getlength(line)) + 1 for lines in texts for line in lines)
        width = max(width, min(widest, 2 * width))
    width += gap
    rows = -(-len(images) // columns)
    grid = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    corners = [
        ((index // columns) * height + gap, (index % columns) * width + gap)
        for index in range(len(images))
    ]
    for image, (top, left) in zip(images, corners, strict=True):
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    if not texts:
        return grid
    picture = Image.fromarray(grid)
    for lines, image, (top, left) in zip(texts, images, corners, strict=True):
        for number, line in enumerate(lines):
            corner = (left, top + image.shape[0] + number * CAPTION_HEIGHT)
            _write_caption(picture, line, corner, width - gap)
    return np.asarray(picture)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(CAPTION_SIZE)  # Pillow's own: no file of the system is needed


def _write_caption(picture: Image.Image, text: str, corner: tuple[int, int], width: int) -> None:
    draw, font = ImageDraw.Draw(picture), _font()
    cut = len(text)
    while cut > 1 and draw.textlength(text[:cut] + "..." * (cut < len(text)), font) > width:
        cut -= 1
    draw.text(corner, text[:cut] + "..." * (cut < len(text)), fill=(0, 0, 0), font=font)


def grid_columns(num_images: int, num_classes: int) -> int:
    """A column a class where that fits a screen, else a square."""
    if 2 <= num_classes <= 16 and num_images > num_classes:
        return num_classes
    return max(1, round(num_images**0.5))


def save_png(path: Path, image: np.ndarray, metadata: dict | None = None) -> None:
    """Writes a uint8 [H,W] / [H,W,1] / [H,W,3] array, whole or not at all.

    metadata is stored as JSON, in the text chunk PNG_KEY: `read_metadata` reads it.
    """
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    texts = PngInfo()
    if metadata is not None:
        texts.add_text(PNG_KEY, json.dumps(metadata))
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, format="PNG", optimize=True, pnginfo=texts)


def read_metadata(path: Path) -> dict:
    """The metadata that `save_png` stored; {} if there is none."""
    with Image.open(path) as image:
        return json.loads(image.text.get(PNG_KEY, "{}"))
