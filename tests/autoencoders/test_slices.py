"""Decoding in slices and over devices."""

import dataclasses

import jax
import numpy as np
import pytest

from flowdcn_jax import sampling
from flowdcn_jax.autoencoders import Autoencoder, decode_images, decode_pixels
from flowdcn_jax.autoencoders.autoencoder import PIXELS_PER_SLICE
from flowdcn_jax.models import abstract_model
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh
from tests import tiny
from tests.autoencoders.conftest import decode

pytestmark = pytest.mark.usefixtures("quick_compilation")


def latents(count, size=(2, 3)):
    return np.random.default_rng(0).normal(size=(count, *size, 4)).astype(np.float32)


def convolving(downsampling):
    """A decoder of one 3x3 convolution, whose pixels are repeated: quick to compile and to run."""
    kernel = np.random.default_rng(1).normal(size=(3, 3, 4, 1)).astype(np.float32) / 6

    def decode(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, params, (1, 1), "SAME", dimension_numbers=layout)
        return x.repeat(downsampling, axis=1).repeat(downsampling, axis=2)

    return Autoencoder(
        name="convolving", downsampling=downsampling, encode=None, decode=decode, params=kernel
    )


@pytest.mark.parametrize(
    "num_devices, count, downsampling, images_per_slice",
    [(1, 7, 240, 3), (1, 3, 432, 0), (2, 10, 280, 2), (8, 8, 400, 1)],
)
def test_slices_and_devices_give_what_one_batch_gives(
    num_devices, count, downsampling, images_per_slice
):
    """Of images with so many pixels that so many fit a slice; 0: not even one does."""
    autoencoder = convolving(downsampling)
    mesh = make_mesh(-1, 1, jax.devices()[:num_devices])
    x = latents(count)
    side_pixels = (2 * downsampling, 3 * downsampling)
    assert PIXELS_PER_SLICE // np.prod(side_pixels) == images_per_slice
    expected = decode_pixels(decode(autoencoder, x))
    compiled = (
        jax.jit(
            lambda params, x: decode_images(autoencoder, params, x, mesh=mesh),
            in_shardings=(None, batch_sharding(mesh)),
        )
        .lower(autoencoder.params, x)
        .compile()
    )
    images = np.asarray(compiled(autoencoder.params, jax.device_put(x, batch_sharding(mesh))))
    assert images.shape == (count, *side_pixels, 1) and images.dtype == np.uint8
    difference = np.abs(images.astype(np.int16) - np.asarray(expected, np.int16))
    assert difference.max() <= 1 and difference.mean() < 0.01
    text = compiled.as_text()
    assert "all-gather" not in text and "all-to-all" not in text  # rows stay where they are


def test_large_images_are_decoded_one_by_one(load):
    """The decoder never sees more rows than fit: 4 of 512x512."""
    seen = []
    preview = load("preview")

    def decode(params, x):
        seen.append(x.shape)
        return preview.decode(params, x)

    watched = dataclasses.replace(preview, decode=decode)
    mesh = make_mesh(-1, 1, jax.devices()[:1])
    for size, expected in (((64, 64), 4), ((128, 128), 1), ((256, 256), 1)):
        jax.eval_shape(lambda x: decode_images(watched, {}, x, mesh=mesh), latents(8, size))
        assert seen.pop() == (expected, *size, 4)
    assert not seen


def test_the_decoders_weights_are_arguments_of_the_generator(taesd_folder):
    config = tiny.config(model__in_channels=4, autoencoder__downsampling=8)
    config.autoencoder.update(name="taesd", weights=str(taesd_folder))
    mesh = make_mesh(-1, 1, jax.devices()[:1])
    settings = sampling.Settings(image_size=(16, 32), num_steps=1, guidance=1.0)
    generator = sampling.make_generator(config, mesh, settings)
    _, params = abstract_model(config.model)
    labels = np.zeros(2, np.int32)
    traced = generator.func.trace(*generator.args, params, np.arange(2, dtype=np.uint32), labels)
    constants = [np.size(constant) for constant in traced.jaxpr.consts]
    assert max(constants, default=0) < 100
    x, images = traced.out_info
    assert x.shape == (2, 2, 4, 4) and images.shape == (2, 16, 32, 3)
