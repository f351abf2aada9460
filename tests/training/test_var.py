"""Training on aspect buckets: every shape compiled at the start, exact resumption, square grids."""

import dataclasses
import json
import shutil
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from flowdcn_jax import data
from flowdcn_jax.data.aspect_buckets import AspectBuckets
from flowdcn_jax.errors import UserError
from flowdcn_jax.training.loop import compile_steps
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

BUCKETS = AspectBuckets(image_size=32, count=3, min_aspect=0.5, max_aspect=2.0, side_multiple=16)
COUNTS = {"4x2": 30, "2x4": 12}  # none of aspect 1.25: 16x32, as of aspect 2


def write(folder, channels=4):
    """Random latents in two buckets."""
    generator = np.random.default_rng(channels)
    counts = {f"bucket_{size}x{channels}": count for size, count in COUNTS.items()}
    manifest = tiny.manifest(aspect_buckets=dataclasses.asdict(BUCKETS))
    manifest["num_examples"] = counts
    for name, count in counts.items():
        shape = tuple(map(int, name.removeprefix("bucket_").split("x")))
        data.write_latents(
            [{"mean": generator.normal(size=shape), "label": i % 10} for i in range(count)],
            data_dir=folder,
            latent_shape=shape,
            num_classes=10,
            stochastic=False,
            mirrored=False,
            config_name=name,
            metadata=manifest,
        )


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write(folder)
    return folder


def config(latents, **overrides):
    result = tiny.config(model__in_channels=4, **overrides)
    result.data.update(name="latents", data_dir=str(latents), image_size=32)
    result.data.aspect_buckets.update(count=3, min_aspect=0.5, max_aspect=2.0, side_multiple=16)
    result.autoencoder.update(name="preview", downsampling=8)
    return result


def test_the_config_means_these_buckets():
    assert BUCKETS.sizes == ((32, 16), (16, 32))


def test_the_shapes_are_compiled_side_by_side(latents):
    both_there = threading.Barrier(len(COUNTS), timeout=20)
    shapes = [(16, 4, 2, 4), (16, 2, 4, 4)]

    class Lowered:
        def __init__(self, shape):
            image = jax.ShapeDtypeStruct(shape, np.float32)
            self.args_info = ((None, {"image": image}), {})

        def compile(self):
            both_there.wait()
            return self

    lowered = [Lowered(shape) for shape in shapes]
    source = data.make_source(config(latents).data)
    compiled = compile_steps(lowered, source, say=lambda text: None)
    assert compiled == dict(zip(shapes, lowered, strict=True))


def test_a_run_resumes_exactly_and_draws_square_grids(latents, tmp_path, capsys):
    options = dict(checkpoint__every_steps=12)
    straight = config(latents, train__num_steps=12, log__sample_every_steps=12, **options)
    tiny.train(straight, tmp_path / "straight")
    printed = capsys.readouterr()
    messages = printed.out + printed.err
    for number, shape in enumerate(["(4, 2, 4), 30 images", "(2, 4, 4), 12 images"], start=1):
        assert f"compiled {number} of 2 shapes: {shape}" in messages
    assert messages.index("compiled 2 of 2") < messages.index("loss")  # before the first step
    grid = Image.open(tmp_path / "straight" / "samples" / "step_00000012.png")
    assert grid.width == grid.height  # two by two squares

    tiny.train(config(latents, train__num_steps=5, **options), tmp_path / "resumed")
    tiny.train(config(latents, train__num_steps=12, **options), tmp_path / "resumed")
    assert "going on from step 5" in "".join(capsys.readouterr())
    assert tiny.numbers(tmp_path / "resumed") == tiny.numbers(tmp_path / "straight")
    straight, resumed = (tiny.checksums(tmp_path / name, 12) for name in ("straight", "resumed"))
    assert straight["state"] == resumed["state"] and straight["ema"] == resumed["ema"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(side_multiple=8), "side_multiple is 8; expected a multiple of 16"),
        (dict(count=-1), "aspect_buckets.count is -1; expected at least 0"),
        (dict(max_aspect=0.1), "config.data.aspect_buckets: aspects go from 0.5 to 0.1"),
        (dict(count=2), "was cached in the buckets .*'count': 3.*the config asks for .*'count': 2"),
        (dict(min_aspect=1.0, max_aspect=1.0), "no latents with 4 channels .* in the buckets"),
    ],
)
def test_buckets_that_cannot_be_or_are_not_cached_are_refused(latents, tmp_path, change, message):
    bad = config(latents)
    bad.data.aspect_buckets.update(change)
    with pytest.raises(UserError, match=message):
        tiny.train(bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(data__random_flip=True), "cached without mirror images: random_flip=False"),
        (dict(data__name="digits"), "aspect_buckets are for latents, not digits"),
        (
            dict(model__in_channels=3),
            r"no latents with 3 channels \(model.in_channels\) are cached",
        ),
    ],
)
def test_what_does_not_fit_buckets_is_refused(latents, tmp_path, overrides, message):
    bad = config(latents)
    for key, value in overrides.items():
        section, name = key.split("__")
        bad[section][name] = value
    with pytest.raises(UserError, match=message):
        tiny.train(bad, tmp_path / "run")


def test_latents_of_two_autoencoders_lie_in_one_folder(tmp_path):
    for channels in (4, 32):
        write(tmp_path, channels)
    section = config(tmp_path).data
    for channels in (4, 32):
        source = data.make_source(section, channels=channels)
        shapes = [bucket.image_shape for bucket in source.buckets]
        assert shapes == [(4, 2, channels), (2, 4, channels)]
    with pytest.raises(UserError, match="no latents with 3 channels .*are cached in the buckets"):
        data.make_source(section, channels=3)


def test_buckets_that_were_not_cached_together_are_refused(latents, tmp_path):
    shutil.copytree(latents, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "imagenet_latents" / "bucket_2x4x4" / "1.0.0" / "metadata.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | tiny.manifest(aspect_buckets=None)))
    with pytest.raises(UserError, match=f"{path.parent} was cached in the buckets None; the conf"):
        data.make_source(config(tmp_path).data)
    manifest["settings"]["autoencoder"]["shift"] = 0.5
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="2x4x4.* and .*4x2x4.* with different settings"):
        data.make_source(config(tmp_path).data)
    path.write_text(json.dumps({"note": 1}))
    with pytest.raises(UserError, match=f"{path} does not say which autoencoder"):
        data.make_source(config(tmp_path).data)
