"""From image files to pixels: decoding to 8-bit RGB, then cropping as in ADM.

ADM is Dhariwal and Nichol, arXiv 2105.05233.
"""

import functools
import io
import math

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from flowdcn_jax.data.prepared import DataError

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
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = {b"iCCP", b"tEXt", b"zTXt", b"iTXt"}
_WHITE = (255, 255, 255, 255)
# A hair-thin image becomes huge when its short side is enlarged; the limit is that for bombs.
_MAX_RESIZED_PIXELS = 2 * Image.MAX_IMAGE_PIXELS


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
    try:
        return _to_rgb(_load(encoded))
    except BadImageError:
        raise
    except UnidentifiedImageError as error:  # its own message holds an address in memory
        raise BadImageError("not an image that Pillow can read") from error
    except Exception as error:  # whatever a damaged file makes Pillow raise
        if _of_machine(error):
            raise
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def open_formats() -> dict[str, str]:
    """Formats that are read, by file extension in lower case: {".jpg": "JPEG", ...}."""
    formats = _formats()
    extensions = Image.registered_extensions()
    return {extension: name for extension, name in extensions.items() if name in formats}


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _PROGRAMS)


def _of_machine(error: Exception) -> bool:
    """Whether the machine has failed, not the file; Pillow gives its own OSErrors no number."""
    numbered = isinstance(error, OSError) and error.errno is not None
    return numbered or isinstance(error, MemoryError)


def _load(encoded: bytes) -> Image.Image:
    """The upright image in its own mode."""
    try:
        image = _decode(encoded)
    except Exception as error:
        bare = _without_texts(encoded)
        if _of_machine(error) or bare == encoded:
            raise
        image = _decode(bare)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # damaged EXIF is common, and no reason to lose a sound image
        if _of_machine(error):
            raise
        orientation = None
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _decode(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=_formats())
    image.load()
    return image


def _without_texts(encoded: bytes) -> bytes:
    """A PNG file without its texts and colour profile, whose size Pillow limits; others as is."""
    if not encoded.startswith(_PNG):
        return encoded
    kept, place = [_PNG], len(_PNG)
    while place < len(encoded):
        end = place + 12 + int.from_bytes(encoded[place : place + 4])
        if encoded[place + 4 : place + 8] not in _PNG_TEXTS:
            kept.append(encoded[place:end])
        place = end
    return b"".join(kept)


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
