"""Sampling: an image depends on its seed, index and class, not on batches or devices."""

import functools
import re

import jax
import numpy as np
import pytest

from flowdcn_jax import sampling
from flowdcn_jax.autoencoders import decode_pixels, preview_latents
from flowdcn_jax.models import abstract_model
from flowdcn_jax.runs.checkpoint import Weights
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.sampling.generator import stream_keys
from tests import tiny
from tests.comparison import relative_error

CONFIG = tiny.config()

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def make_generator(settings):
    return sampling.make_generator(CONFIG, make_mesh(devices=jax.devices()[:1]), settings)


def draw(params, labels, *, batch_size=8, **options):
    generator = make_generator(sampling.Settings(**dict(num_steps=3, guidance=1.375) | options))
    return sampling.generate_images(
        generator, params, np.asarray(labels), batch_size=batch_size, progress=False
    )


def test_batches_do_not_change_an_image(params):
    labels = np.arange(11) % 10
    x, images = draw(params, labels)
    assert x.shape == (11, 8, 8, 1) and images.dtype == np.uint8
    assert relative_error(draw(params, labels, batch_size=1)[0], x) < 1e-5
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


def test_no_two_streams_of_noise_share_a_key():
    streams = stream_keys(0)
    keys = [*streams, *(jax.random.fold_in(key, i) for key in streams for i in range(50))]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize("size, adjustment", [((12, 12), "paper"), ((6, 14), "released")])
def test_any_size_and_aspect_with_any_adjustment(params, size, adjustment):
    x, images = draw(params, [0, 1], image_size=size, resolution_adjustment=adjustment)
    assert images.shape == (2, *size, 1) and np.isfinite(x).all() and x.std() > 0.1


def test_a_model_that_guides_itself_is_not_guided(params):
    guide = Weights(step=1, config=CONFIG, class_names=None, params=params)
    mesh, settings = make_mesh(devices=jax.devices()[:1]), sampling.Settings(num_steps=3)
    guided = sampling.make_generator(CONFIG, mesh, settings, guide=guide)
    x, _ = guided(params, np.arange(8, dtype=np.uint32), np.arange(8))
    assert relative_error(x, draw(params, np.arange(8), guidance=1.0)[0]) < 1e-5
    other = guide._replace(config=tiny.config(model__in_channels=3))
    with pytest.raises(sampling.SamplingError, match="guide's .*in_channels is 3; expected 1"):
        sampling.make_generator(CONFIG, mesh, settings, guide=other)


@pytest.mark.parametrize(
    "options, guided_by_another",
    [
        ({}, False),
        (dict(guidance_channels="three"), False),
        (dict(guidance_interval=(0.2, 0.8)), False),
        ({}, True),
    ],
)
def test_devices_do_not_wait_for_one_another_between_steps(options, guided_by_another):
    config = tiny.config(model__in_channels=4)
    _, shapes = abstract_model(config.model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    guide = Weights(1, config, None, params) if guided_by_another else None
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
    settings = sampling.Settings(sampler="heun", num_steps=4, guidance=2.0)
    assert settings.num_evaluations() == (7, 14)
    assert sampling.Settings(num_steps=10, guidance=1.0).num_evaluations() == (10, 10)
    interval = sampling.Settings(num_steps=10, guidance=2.0, guidance_interval=(0.2, 0.5))
    assert interval.num_evaluations() == (10, 14)


@pytest.mark.parametrize("process, shown", [(0, True), (1, False)])
def test_one_process_alone_shows_progress(monkeypatch, capsys, process, shown):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    sampling.generate_images(
        lambda params, indices, labels: (indices, indices),
        None,
        np.zeros(3),
        batch_size=2,
        progress=True,
    )
    assert ("3/3" in capsys.readouterr().err) == shown


def test_decoding():
    x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0], np.float32).reshape(1, 1, 5, 1)
    assert decode_pixels(x).ravel().tolist() == [0, 0, 128, 255, 255]
    assert preview_latents(np.zeros((1, 2, 2, 4))).shape == (1, 2, 2, 3)
    assert preview_latents(np.zeros((1, 2, 2, 1))).shape == (1, 2, 2, 3)
