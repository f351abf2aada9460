"""Sampling: an image depends on its seed, index and class, not on batches or devices."""

import re

import jax
import numpy as np
import pytest

from flowdcn_jax import sampling
from flowdcn_jax.autoencoders import decode_pixels, load_autoencoder, preview_latents
from flowdcn_jax.images import make_grid
from flowdcn_jax.models import abstract_model
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.sampling.generator import Guide, draw_batches, image_keys
from tests import tiny
from tests.comparison import relative_error

CONFIG = tiny.config()

pytestmark = pytest.mark.usefixtures("quick_compilation")


def draw(model, labels, *, batch_size=8, **options):
    """(x, images)"""
    generator = model.generator(model.fill_settings(sampling.Settings(**options)))
    return sampling.generate_images(
        generator, model.weights.params, np.asarray(labels), batch_size=batch_size, progress=False
    )


def test_batches_do_not_change_an_image(model):
    labels = np.arange(11) % 10
    x, images = draw(model, labels)
    assert x.shape == (11, 8, 8, 1) and images.dtype == np.uint8
    assert relative_error(draw(model, labels, batch_size=1)[0], x) < 1e-5
    assert relative_error(draw(model, labels[:3])[0], x[:3]) < 1e-5


def test_the_same_call_gives_the_same_bits_and_another_seed_or_class_does_not(model):
    first, again = draw(model, [1, 2])[0], draw(model, [1, 2])[0]
    np.testing.assert_array_equal(first, again)
    assert relative_error(draw(model, [1, 2], seed=1)[0], first) > 0.1
    other_class = draw(model, [1, 3])[0]
    assert relative_error(other_class[0], first[0]) < 1e-6
    assert relative_error(other_class[1], first[1]) > 1e-4


def test_a_trajectory_ends_in_the_image_and_begins_with_its_noise(model):
    labels, settings = np.arange(8), model.fill_settings(sampling.Settings())
    options = dict(batch_size=8, progress=False)
    kept = model.draw(settings, labels, keep=(0, 1, 2), **options)
    assert kept.shape == (8, 3, 8, 8, 1) and kept.dtype == np.uint8
    images = model.draw(settings, labels, **options)
    np.testing.assert_allclose(kept[:, -1].astype(int), images.astype(int), atol=1)
    keys, _ = image_keys(settings.seed, np.arange(8, dtype=np.uint32))
    noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(keys)
    np.testing.assert_array_equal(kept[:, 0], decode_pixels(noise))


def test_noise_is_standard_normal_and_independent():
    keys, _ = image_keys(0, np.arange(64, dtype=np.uint32))
    flat = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (8 * 8 * 4,)))(keys))
    assert abs(flat.mean()) < 0.03 and abs(flat.std() - 1) < 0.03
    correlation = np.corrcoef(flat)
    assert np.abs(correlation - np.eye(64)).max() < 0.4


def test_no_two_images_and_no_two_kinds_of_noise_share_a_key():
    keys = [key for kind in image_keys(0, np.arange(50, dtype=np.uint32)) for key in kind]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys) == 100


@pytest.mark.parametrize("adjustment", ["paper", "released"])
def test_any_size_and_aspect_with_any_adjustment(model, adjustment):
    x, images = draw(model, [0, 1], image_size=(6, 14), resolution_adjustment=adjustment)
    assert images.shape == (2, 6, 14, 1) and np.isfinite(x).all() and x.std() > 0.1


def test_a_model_that_guides_itself_is_not_guided(model, one_device):
    params, settings = model.weights.params, sampling.Settings()
    generator = sampling.make_generator(CONFIG, one_device, settings, guide=Guide(CONFIG, params))
    x, _ = generator(params, np.arange(8, dtype=np.uint32), np.arange(8))
    assert relative_error(x, draw(model, np.arange(8), guidance=1.0)[0]) < 1e-5
    other = Guide(tiny.config(model__in_channels=3), params)
    with pytest.raises(sampling.SamplingError, match="guide's .*in_channels is 3; expected 1"):
        sampling.make_generator(CONFIG, one_device, settings, guide=other)


@pytest.mark.parametrize(
    "options, guided_by_another",
    [
        (dict(guidance_channels="three", guidance_interval=(0.2, 0.8)), False),
        ({}, True),
    ],
)
def test_devices_do_not_wait_for_one_another_between_steps(options, guided_by_another):
    config = tiny.config(model__in_channels=4)
    _, shapes = abstract_model(config.model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    guide = Guide(config, params) if guided_by_another else None
    settings = sampling.Settings(sampler="euler_sde", num_steps=3, guidance=2.0, **options)
    generator = sampling.make_generator(config, make_mesh(), settings, guide=guide)
    indices = np.arange(16, dtype=np.uint32)
    program = generator.func.lower(*generator.args, params, indices, indices).compile().as_text()
    assert " while(" in program and "num_partitions=8" in program
    collectives = r"all-to-all|collective-permute|all-gather|all-reduce|reduce-scatter"
    computations = re.split(r"\n(?=ENTRY |%)", program)
    with_some = [text for text in computations if re.search(rf" ({collectives})(-start)?\(", text)]
    assert len(with_some) == 1 and with_some[0].startswith("ENTRY ")  # the results are gathered
    assert set(re.findall(rf" ({collectives})(?:-start)?\(", with_some[0])) == {"all-gather"}


def test_model_passes_are_counted():
    def count(**options):
        settings = sampling.fill_settings(sampling.Settings(**options), CONFIG)
        return sampling.count_evaluations(settings)

    assert count(sampler="heun", num_steps=4, guidance=2.0) == (7, 14)
    assert count(num_steps=10, guidance=1.0) == (10, 10)
    assert count(num_steps=10, guidance=2.0, guidance_interval=(0.2, 0.5)) == (10, 14)


@pytest.mark.parametrize("process, shown", [(0, True), (1, False)])
def test_one_process_alone_shows_progress(monkeypatch, capsys, process, shown):
    monkeypatch.setattr(jax, "process_index", lambda: process)  # instead of starting two
    sampling.generate_images(
        lambda params, indices, labels: (indices, indices), None, np.zeros(3), batch_size=2
    )
    assert ("3/3" in capsys.readouterr().err) == shown


def test_the_next_batch_is_under_way_while_one_is_used():
    events = []

    def generator(params, indices, labels):
        events.append(f"start {indices[0]}")
        return indices, indices

    for start, *_ in draw_batches(
        generator, None, np.zeros(7), ranges=[(0, 4), (5, 7)], batch_size=2, progress=False
    ):
        events.append(f"use {start}")
    assert events == ["start 0", "start 2", "use 0", "start 5", "use 2", "use 5"]


def test_the_grid_of_training_is_of_its_configs_classes(model, one_device):
    config = tiny.config(sampling__classes=(3, 7), sampling__num_images=8)
    autoencoder = load_autoencoder(config.autoencoder)
    grid = sampling.grid_drawer(config, one_device, autoencoder)(model.weights.params)
    _, images = draw(model, [3, 7] * 4)
    np.testing.assert_array_equal(grid, make_grid(images, columns=2))
    assert grid.dtype == np.uint8


def test_decoding():
    x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0], np.float32).reshape(1, 1, 5, 1)
    assert decode_pixels(x).ravel().tolist() == [0, 0, 128, 255, 255]
    assert preview_latents(np.zeros((1, 2, 2, 4))).shape == (1, 2, 2, 3)
    assert preview_latents(np.zeros((1, 2, 2, 1))).shape == (1, 2, 2, 3)
