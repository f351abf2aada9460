"""Sampling: an image depends on its seed, index and class, not on batches or devices."""

import functools

import jax
import numpy as np
import pytest

from flowdcn_jax import sampling
from flowdcn_jax.autoencoders import decode_pixels, preview_latents
from flowdcn_jax.models import abstract_model
from flowdcn_jax.training.checkpoint import Weights
from flowdcn_jax.training.sharding import make_mesh
from tests import tiny
from tests.comparison import relative_error

CONFIG = tiny.config()


@pytest.fixture(scope="module")
def params():
    """Random everywhere, for a fresh model's velocity is zero."""
    random = np.random.default_rng(0)
    _, params = abstract_model(CONFIG.model)
    return jax.tree.map(lambda leaf: 0.3 * random.standard_normal(leaf.shape, np.float32), params)


def make_generator(num_devices, settings, guide=None):
    mesh = make_mesh(-1, 1, jax.devices()[:num_devices])
    return sampling.make_generator(CONFIG, mesh, settings, guide=guide)


cached_generator = functools.cache(make_generator)


def draw(params, labels, *, num_devices=1, batch_size=8, guide=None, **options):
    settings = sampling.Settings(**dict(num_steps=3) | options)
    make = cached_generator if guide is None else make_generator
    generator = make(num_devices, settings, guide)
    return sampling.generate_images(
        generator, params, np.asarray(labels), batch_size=batch_size, progress=False
    )


def test_batches_and_devices_do_not_change_an_image(params):
    labels = np.arange(11) % 10
    x, images = draw(params, labels)
    assert x.shape == (11, 8, 8, 1) and images.dtype == np.uint8
    for options in (dict(batch_size=16), dict(batch_size=1), dict(num_devices=8, batch_size=8)):
        assert relative_error(draw(params, labels, **options)[0], x) < 1e-5
    assert relative_error(draw(params, labels[:3])[0], x[:3]) < 1e-5


def test_the_same_call_gives_the_same_bits_and_another_seed_or_class_does_not(params):
    first, again = draw(params, [1, 2])[0], draw(params, [1, 2])[0]
    np.testing.assert_array_equal(first, again)
    assert relative_error(draw(params, [1, 2], seed=1)[0], first) > 0.1
    other_class = draw(params, [1, 3])[0]
    assert relative_error(other_class[0], first[0]) < 1e-6
    assert relative_error(other_class[1], first[1]) > 1e-4


def test_noise_is_standard_normal_and_independent():
    noise = sampling.initial_noise(0, np.arange(64, dtype=np.uint32), (8, 8, 4))
    flat = np.asarray(noise).reshape(64, -1)
    assert abs(flat.mean()) < 0.03 and abs(flat.std() - 1) < 0.03
    correlation = np.corrcoef(flat)
    assert np.abs(correlation - np.eye(64)).max() < 0.4


@pytest.mark.parametrize(
    "size, adjustment", [((8, 12), "none"), ((12, 12), "paper"), ((6, 14), "released")]
)
def test_any_size_and_aspect_with_any_adjustment(params, size, adjustment):
    x, images = draw(params, [0, 1], image_size=size, resolution_adjustment=adjustment)
    assert images.shape == (2, *size, 1) and np.isfinite(x).all() and x.std() > 0.1


def test_an_sde_draws_each_images_noise_by_its_index(params):
    options = dict(sampler="euler_sde", seed=3)
    x = draw(params, np.arange(5), **options)[0]
    split = draw(params, np.arange(5), num_devices=2, batch_size=4, **options)[0]
    assert relative_error(split, x) < 1e-5


def test_a_model_that_guides_itself_is_not_guided(params):
    guide = Weights(step=1, config=CONFIG, class_names=None, params=params)
    unguided = draw(params, [1, 2], guidance=1.0)[0]
    assert relative_error(draw(params, [1, 2], guidance=3.0, guide=guide)[0], unguided) < 1e-5
    other = guide._replace(config=tiny.config(model__in_channels=3))
    with pytest.raises(sampling.SamplingError, match="guide's .*in_channels is 3; expected 1"):
        draw(params, [1, 2], guide=other)


def test_model_passes_are_counted():
    settings = sampling.Settings(sampler="heun", num_steps=4, guidance=2.0)
    assert settings.num_evaluations() == (7, 14)
    assert sampling.Settings(num_steps=10, guidance=1.0).num_evaluations() == (10, 10)
    interval = sampling.Settings(num_steps=10, guidance_interval=(0.2, 0.5))
    assert interval.num_evaluations() == (10, 14)


def test_labels_in_turn():
    assert sampling.labels_in_turn((3, 7), 5, 10).tolist() == [3, 7, 3, 7, 3]
    assert sampling.labels_in_turn((), 4, 3).tolist() == [0, 1, 2, 0]


def test_class_names_and_numbers():
    names = ("cat", "dog", "7")
    assert sampling.parse_classes(["dog", " 0", "7"], 3, names) == [1, 0, 2]
    with pytest.raises(sampling.SamplingError, match="'cow'; expected numbers from 0 to 2$"):
        sampling.parse_classes(["cow"], 3, None)


def test_decoding():
    x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0], np.float32).reshape(1, 1, 5, 1)
    assert decode_pixels(x).ravel().tolist() == [0, 0, 128, 255, 255]
    assert preview_latents(np.zeros((1, 2, 2, 4))).shape == (1, 2, 2, 3)
    assert preview_latents(np.zeros((1, 2, 2, 1))).shape == (1, 2, 2, 3)
