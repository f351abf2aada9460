"""Images in every form: what they become, and how the bad ones are told."""

import errno
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from flowdcn_jax.data.image_files import BadImageError, decode_rgb, open_formats
from tests.data.image_files import JPEG, bomb, colours, encoded


def decoded(image, form="PNG", **options):
    result = decode_rgb(encoded(image, form, **options))
    assert result.mode == "RGB"
    return np.asarray(result)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "TGA", "GIF", "WEBP", "JPEG2000"])
def test_formats_without_loss_keep_every_pixel(form):
    pixels = colours() // 128 * 255  # eight colours: as many as GIF needs
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(decoded(Image.fromarray(pixels), form, **options), pixels)


def test_the_extension_does_not_matter_and_common_ones_are_known():
    known = open_formats()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp", ".avif"} <= known.keys()
    assert ".eps" not in known  # Pillow starts Ghostscript for it


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(orientation):
    upright = Image.fromarray(colours())
    # What a camera held in this way stores: EXIF's definition, by the stored first row and column.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(270, expand=True),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    np.testing.assert_array_equal(decoded(stored, exif=exif), np.asarray(upright))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_damaged_exif_does_not_lose_the_image(exif):
    image = Image.fromarray(colours(16, 16))
    assert decoded(image, "JPEG", exif=exif).shape == (16, 16, 3)


def test_grey_and_palette_and_two_level_images():
    grey = colours()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(decoded(Image.fromarray(grey)), expected)
    palette = Image.fromarray(grey).convert("P")
    np.testing.assert_array_equal(decoded(palette), expected)
    np.testing.assert_array_equal(
        decoded(Image.fromarray(grey > 127)), np.where(expected > 127, 255, 0)
    )


def test_cmyk_jpeg():
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[..., 1] = 255  # magenta
    pixels = decoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=95)
    np.testing.assert_allclose(pixels, np.broadcast_to([255, 0, 255], (16, 16, 3)), atol=3)


def test_sixteen_bits_keep_the_upper_eight():
    values = np.random.default_rng(0).integers(0, 65536, (6, 9)).astype(np.uint16)
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for form in ("PNG", "TIFF", "PPM"):
        np.testing.assert_array_equal(decoded(Image.fromarray(values), form), expected)


def png_of_16_bit_rgb(values):
    """Pillow cannot write one."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_sixteen_bit_colour_keeps_the_upper_eight():
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    np.testing.assert_array_equal(decode_rgb(png_of_16_bit_rgb(values)), values >> 8)


def test_what_is_transparent_lets_white_through():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (10, 20, 30, 0)
    pixels[1, 0] = (0, 0, 0, 51)
    expected = [[[10, 20, 30], [255] * 3], [[204] * 3, [255] * 3]]
    np.testing.assert_array_equal(decoded(Image.fromarray(pixels)), expected)
    grey = Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), "LA")
    np.testing.assert_array_equal(decoded(grey), [[[7] * 3, [255] * 3]])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(decoded(palette, transparency=1), [[[1, 2, 3], [255] * 3]])


def test_of_several_frames_the_first():
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (30, 90)]
    pixels = decoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels, 30)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "the file is empty"),
        (b"no image, although its name may say so", "not an image that Pillow can read"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:40], "not an image|OSError|truncated|SyntaxError"),
        (encoded(Image.fromarray(colours()))[:-30], "OSError|SyntaxError|truncated"),
        (bomb(), "DecompressionBombError.*900000000 pixels"),
        (encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((2, 2), 10**6, np.int32)), "TIFF"), "beyond 16 bits"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    ],
)
def test_bad_images_are_told_and_never_a_traceback(data, message):
    with pytest.raises(BadImageError, match=message):
        decode_rgb(data)


def test_a_message_does_not_change_from_run_to_run():
    messages = set()
    for _ in range(3):
        with pytest.raises(BadImageError) as caught:
            decode_rgb(b"text")
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")], ids=["memory", "files"]
)
@pytest.mark.parametrize("place", ["load", "convert", "getexif"])
def test_a_machine_that_fails_does_not_make_an_image_bad(monkeypatch, place, error):
    def fails(*args, **kwargs):  # Pillow's own classes: no file makes a machine fail
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, place, fails)
    with pytest.raises(type(error)):
        decode_rgb(encoded(Image.fromarray(colours())))
