"""ADM's crop, the crops of aspect buckets, and the buckets themselves."""

import numpy as np
import pytest
from PIL import Image

from flowdcn_jax.data import DataError
from flowdcn_jax.data.aspect_buckets import AspectBuckets
from flowdcn_jax.data.image_files import BadImageError, centre_crop, random_crop


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height, width):
    """Red grows downwards and green to the right, from 0 to 255."""
    down, right = np.mgrid[0:height, 0:width]
    channels = [255 * down / (height - 1), 255 * right / (width - 1), np.zeros_like(down)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def box_halves(pixels):
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    parts = pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).astype(float)
    return parts.mean(axis=(1, 3))


def test_an_image_of_the_right_height_is_only_cropped():
    pixels = noise(16, 37)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(pixels), 16), pixels[:, 10:26])
    np.testing.assert_array_equal(
        centre_crop(Image.fromarray(pixels.swapaxes(0, 1)), 16), pixels[:, 10:26].swapaxes(0, 1)
    )


@pytest.mark.parametrize("times", [1, 2, 3])
def test_large_images_are_halved_with_a_box_filter(times):
    pixels = noise(16 << times, 24 << times)
    expected = pixels.astype(float)
    for _ in range(times):
        expected = box_halves(expected)
    crop = centre_crop(Image.fromarray(pixels), 16)
    np.testing.assert_allclose(crop, expected[:, 4:20], atol=times)  # Pillow rounds twice
    turned = centre_crop(Image.fromarray(pixels.swapaxes(0, 1)), 16)
    np.testing.assert_allclose(turned, expected[:, 4:20].swapaxes(0, 1), atol=times)


def test_between_the_halvings_it_is_bicubic():
    # 31 is less than twice 16: one bicubic step, as Pillow makes it, and no box filter.
    pixels = noise(31, 31)
    expected = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(pixels), 16), np.asarray(expected))
    # 63 x 63: one box step, of 31 x 31, then bicubic.
    pixels = noise(63, 63)
    halved = Image.fromarray(pixels).resize((31, 31), Image.Resampling.BOX)
    expected = halved.resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(pixels), 16), np.asarray(expected))


def test_small_images_are_enlarged_and_centred():
    crop = centre_crop(Image.fromarray(smooth(5, 11)), 20).astype(int)
    assert crop.shape == (20, 20, 3)
    red, green = crop[:, 10, 0], crop[10, :, 1]
    assert (np.diff(red) >= -1).all() and red[0] < 10 and red[-1] > 245  # all of the height
    assert (np.diff(green) >= -1).all()
    assert abs(green.mean() - 127.5) < 3 and green[0] > 50 and green[-1] < 205  # its middle


def test_random_crops_cover_the_image_from_edge_to_edge():
    image = Image.fromarray(smooth(40, 100))
    first = random_crop(image, 20, 20, place=0.0)
    last = random_crop(image, 20, 20, place=1 - 1e-9)
    assert first.shape == last.shape == (20, 20, 3)
    assert first[:, 0, 1].max() <= 4 and last[:, -1, 1].min() >= 251  # green: left and right ends
    for crop in (first, last):  # the height fits as a whole
        assert crop[0, 0, 0] <= 5 and crop[-1, 0, 0] >= 250
    places = np.linspace(0, 1, 400, endpoint=False)
    lefts = {random_crop(image, 20, 20, place=place)[0, 0, 1] for place in places}
    assert len(lefts) == 31  # 50 - 20 + 1 places


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 2), (64, 64), (47, 200)])
@pytest.mark.parametrize("window", [(32, 32), (48, 16), (16, 48)])
def test_any_size_covers_any_window(size, window):
    crop = random_crop(Image.fromarray(noise(*size)), *window, place=0.999)
    assert crop.shape == (*window, 3) and crop.dtype == np.uint8


def test_a_wide_image_is_cropped_and_a_hair_is_bad():
    wide = Image.fromarray(np.zeros((40, 30_000, 3), np.uint8))
    assert centre_crop(wide, 32).shape == (32, 32, 3)
    with pytest.raises(BadImageError, match="too thin: to cover 256x256 it becomes 7680000x256"):
        centre_crop(Image.fromarray(np.zeros((1, 30_000, 3), np.uint8)), 256)


PAPER = dict(image_size=256, count=10, min_aspect=0.5, max_aspect=3.0, side_multiple=16)


def test_the_buckets_of_the_paper():
    assert AspectBuckets(**PAPER).sizes == (
        (352, 176), (288, 224), (240, 256), (208, 288), (192, 320),
        (176, 336), (160, 368), (160, 400), (144, 416), (144, 432),
    )  # fmt: skip


@pytest.mark.parametrize(
    "height, width, bucket",
    [
        (1000, 10, (352, 176)),
        (400, 255, (352, 176)),  # 0.6375, below the middle of 0.5 and 0.7778
        (400, 256, (288, 224)),
        (500, 500, (240, 256)),
        (300, 400, (208, 288)),
        (10, 1000, (144, 432)),
    ],
)
def test_an_image_goes_to_the_bucket_nearest_in_aspect(height, width, bucket):
    assert AspectBuckets(**PAPER).nearest(height, width) == bucket


def test_aspects_of_one_size_share_a_bucket():
    buckets = AspectBuckets(**PAPER | {"count": 200})
    assert len(set(buckets.sizes)) == len(buckets.sizes) < 60
    assert buckets.nearest(352, 176) == (352, 176) and buckets.nearest(100, 50) == (352, 176)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "count is 0; expected 1 to 65536"),
        ({"min_aspect": 0.0}, "aspects go from 0.0 to 3.0"),
        ({"min_aspect": 4.0}, "aspects go from 4.0 to 3.0"),
        ({"max_aspect": float("nan")}, "to nan"),
        ({"max_aspect": 400.0}, "too extreme for image_size=256"),
    ],
)
def test_bad_buckets_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        AspectBuckets(**PAPER | change)
