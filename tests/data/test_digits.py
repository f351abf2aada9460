"""The embedded digits, and what every source has in common."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from flowdcn_jax.data import DataError, make_batches


def test_digits_have_the_shape_and_range_of_images(open_source):
    source = open_source("digits")
    assert len(source) == 1797
    assert source.image_shape == (16, 16, 1)
    assert source.num_classes == 10
    assert source.class_names == tuple("0123456789")
    assert not source.flips
    batch = next(make_batches(source, batch_size=64, seed=0, num_threads=1, prefetch_batches=1))
    assert batch["image"].shape == (64, 16, 16, 1)
    assert batch["image"].dtype == np.uint8
    assert batch["image"].min() == 0 and batch["image"].max() == 255
    assert batch["label"].shape == (64,) and batch["label"].dtype == np.int32
    assert set(batch["label"]) == set(range(10))


def test_digits_keep_their_pixels_and_labels_and_are_never_flipped(open_source):
    source = open_source("digits", image_size=8)
    indices = np.tile(np.arange(20), 50)  # many visits of each
    batch = source.read(indices, np.arange(len(indices)), 0)
    digits = load_digits()
    expected = np.rint(digits.images[indices] * 255 / 16)
    np.testing.assert_array_equal(batch["image"][..., 0], expected)
    np.testing.assert_array_equal(batch["label"], digits.target[indices])


def test_enlarging_a_digit_keeps_its_mean(open_source):
    means = [
        open_source("digits", image_size=size).read(np.arange(200), np.arange(200), 0)["image"]
        .mean(axis=(1, 2, 3))
        for size in (8, 32)
    ]  # fmt: skip
    np.testing.assert_allclose(means[0], means[1], atol=4)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"random_flip": True}, "never flipped"),
        ({"image_size": 7}, "8 .. 256"),
        ({"image_size": 512}, "8 .. 256"),
        ({"image_size": -4}, "8 .. 256"),
        ({"split": "test"}, "only the split 'train'"),
    ],
)
def test_bad_options_of_digits(open_source, overrides, message):
    with pytest.raises(DataError, match=message):
        open_source("digits", **overrides)


def test_unknown_name_lists_the_choices(open_source):
    with pytest.raises(DataError, match="cifar-10.*'cifar10', 'digits', 'latents'"):
        open_source("cifar-10")
