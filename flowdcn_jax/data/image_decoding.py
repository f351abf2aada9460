"""From the bytes of an image file, in any form that Pillow reads, to 8-bit RGB."""

import functools
import io
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from flowdcn_jax.data.errors import DataError

# Files that Pillow reads only by starting another program: not with files from strangers.
_PROGRAMS = {"EPS"}

_UPRIGHT = {  # EXIF's orientation, and what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255, 255)


class BadImageError(DataError):
    """One image that cannot be used; the message says why, not which."""


def decode_rgb(encoded: bytes) -> Image.Image:
    """The image of a file's bytes as upright 8-bit RGB; of several frames the first.

    Turned as EXIF's orientation says.  What is transparent lets white through.  Palettes, grey and
    CMYK become RGB as Pillow converts them, without their colour profiles; of 16 bits the upper
    eight are kept.  Thread-safe.

    Raises:
        BadImageError: empty, no image, damaged, cut short, of floating-point or 32-bit values
            (whose range is not known), or of more pixels than Pillow takes for a decompression
            bomb (twice `PIL.Image.MAX_IMAGE_PIXELS`, 179 million).
        MemoryError, OSError: the machine's fault, not the file's.
    """
    if not encoded:
        raise BadImageError("the file is empty")
    image = _from_pillow(lambda: _load(encoded))
    return _from_pillow(lambda: _to_rgb(image))


def open_formats() -> dict[str, str]:
    """Formats that are read, by file extension in lower case: {".jpg": "JPEG", ...}."""
    formats = _formats()
    extensions = Image.registered_extensions()
    return {extension: name for extension, name in extensions.items() if name in formats}


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _PROGRAMS)


def _from_pillow(call: Callable[[], Image.Image]) -> Image.Image:
    """The result of `call`, with whatever a damaged file makes Pillow raise as BadImageError."""
    try:
        return call()
    except BadImageError:
        raise
    except UnidentifiedImageError as error:  # its own message holds an address in memory
        raise BadImageError("not an image that Pillow can read") from error
    except Exception as error:
        if _of_machine(error):
            raise
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _of_machine(error: Exception) -> bool:
    """Whether the machine has failed, not the file; Pillow gives its own OSErrors no number."""
    numbered = isinstance(error, OSError) and error.errno is not None
    return numbered or isinstance(error, MemoryError)


def _load(encoded: bytes) -> Image.Image:
    """The upright image in its own mode."""
    image = Image.open(io.BytesIO(encoded), formats=_formats())
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # damaged EXIF is common, and no reason to lose a sound image
        if _of_machine(error):
            raise
        orientation = None
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImageError("floating-point values: their range is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError("values beyond 16 bits: their range is not known")
        return Image.fromarray((values // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")
