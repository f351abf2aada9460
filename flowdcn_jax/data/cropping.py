"""Resizing and cropping as in ADM (Dhariwal and Nichol, arXiv 2105.05233)."""

import math

import numpy as np
from PIL import Image

from flowdcn_jax.data.image_decoding import BadImageError

# A hair-thin image becomes huge when its short side is enlarged; the limit is that for bombs.
_MAX_RESIZED_PIXELS = 2 * Image.MAX_IMAGE_PIXELS


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The central square of an RGB image, as ADM crops: uint8 [size, size, 3].

    Halved with a box filter while the short side is at least 2 * size, then bicubic.

    Raises:
        BadImageError: it is so thin that it would have over 179 million pixels when resized.
    """
    resized = _resize_to_cover(image, size, size)
    # ADM rounds the offset down.
    return _window(resized, (resized.height - size) // 2, (resized.width - size) // 2, size, size)


def random_crop(image: Image.Image, height: int, width: int, *, place: float) -> np.ndarray:
    """A window of an RGB image that was resized to just cover it: uint8 [height, width, 3].

    Args:
        image: any size; resized as in `centre_crop`.
        height: of the window, pixels.
        width: of the window, pixels.
        place: uniform in [0, 1), along the side that is longer than the window: from its first
            possible place to the last.

    Raises:
        BadImageError: see `centre_crop`.
    """
    resized = _resize_to_cover(image, height, width)
    top = math.floor(place * (resized.height - height + 1))
    left = math.floor(place * (resized.width - width + 1))
    return _window(resized, top, left, height, width)


def _resize_to_cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """The smallest size that covers height x width with the image's aspect."""
    while image.width >= 2 * width and image.height >= 2 * height:
        halves = (image.width // 2, image.height // 2)
        image = image.resize(halves, Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > _MAX_RESIZED_PIXELS:
        raise BadImageError(f"too thin: to cover {width}x{height} it becomes {size[0]}x{size[1]}")
    return image.resize(size, Image.Resampling.BICUBIC)


def _window(image: Image.Image, top: int, left: int, height: int, width: int) -> np.ndarray:
    return np.asarray(image.crop((left, top, left + width, top + height)))
