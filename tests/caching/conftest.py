"""A small autoencoder whose latents can be foretold, small images, and what was cached of them."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flowdcn_jax import caching
from flowdcn_jax.autoencoders import Autoencoder
from flowdcn_jax.caching.parts import Parts
from flowdcn_jax.data.aspect_buckets import AspectBuckets
from flowdcn_jax.data.labelled_images import FolderImages
from flowdcn_jax.data.prepared import find_prepared, open_prepared, parse_record

STRIDE = 8


def latent_moments(images):
    """uint8 [n,H,W,3] -> (mean, std) [n,H/8,W/8,4]: colours averaged; the left half's red."""
    x = np.asarray(images, np.float32) / 127.5 - 1
    n, height, width, _ = x.shape
    blocks = x.reshape(n, height // STRIDE, STRIDE, width // STRIDE, STRIDE, 3)
    left = blocks[:, :, :, :, : STRIDE // 2, 0].mean(axis=(2, 4))
    mean = np.concatenate([blocks.mean(axis=(2, 4)), left[..., None]], axis=-1)
    return mean, 0.25 + mean**2 / 8


def _encode(params, images):
    n, height, width, _ = images.shape
    blocks = images.reshape(n, height // STRIDE, STRIDE, width // STRIDE, STRIDE, 3)
    left = blocks[:, :, :, :, : STRIDE // 2, 0].mean(axis=(2, 4))
    mean = jnp.concatenate([blocks.mean(axis=(2, 4)), left[..., None]], axis=-1)
    return mean * params["gain"], (0.25 + mean**2 / 8) * params["spread"]


@pytest.fixture(scope="session")
def autoencoder():
    return Autoencoder(
        name="fake",
        downsampling=STRIDE,
        channels=4,
        scale=0.5,
        shift=0.25,
        params={"gain": np.float32(1), "spread": np.float32(1)},
        weights_sha256="0123",
        encode=_encode,
        decode=lambda params, x: x,
    )


def photo(index):
    """Noise of a size that depends on the index: 16 .. 52 high, 16 .. 48 wide."""
    rng = np.random.default_rng(index)
    size = 16 + (index * 7) % 37, 16 + (index * 11) % 33
    return rng.integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Twenty PNGs of three classes; image i of the list is photo(i)."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(20):
        path = root / f"class {index // 8}" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo(index)).save(path)
    return root


class Images(FolderImages):
    """The images of a folder; `were_read` holds the places of those that were.

    `error` is raised when image `fatal` is due: KeyboardInterrupt ends a job as a kill does.
    """

    def __init__(self, root, *, fatal=None, error=KeyboardInterrupt):
        super().__init__(root)
        self.were_read = set()
        self._fatal = fatal
        self._error = error

    def read(self, index):
        if index == self._fatal:
            raise self._error
        self.were_read.add(index)
        return super().read(index)


BUCKETS = AspectBuckets(image_size=24, count=3, min_aspect=0.5, max_aspect=2.0, side_multiple=8)


@pytest.fixture(scope="session")
def default_job(autoencoder, photos):
    """A caching job on the photos; any field of Job can be given, `data_dir` must be."""

    def make_job(*, root=photos, fatal=None, error=KeyboardInterrupt, params=None, **fields):
        defaults = dict(
            dataset=f"folder:{root}",
            split="train",
            images=Images(root, fatal=fatal, error=error),
            autoencoder=autoencoder,
            autoencoder_dtype="float32",
            image_size=16,
            buckets=None,
        )
        if params:
            changed = autoencoder.params | params
            defaults["autoencoder"] = dataclasses.replace(autoencoder, params=changed)
        return caching.Job(**defaults | fields)

    return make_job


@pytest.fixture
def make_job(default_job, tmp_path):
    """As `default_job`, in a place of the test's own."""
    return functools.partial(default_job, data_dir=tmp_path / "data")


def cache(job, **overrides):
    """caching.cache_latents, every option with a default; of 20 images a part has 6, 6, 6 and 2."""
    options = dict(batch_size=1, num_threads=2, max_bad=0, shard_index=0, num_shards=1)
    return caching.cache_latents(job, **options | dict(images_per_part=6) | overrides)


@pytest.fixture(scope="session")
def finished(default_job, tmp_path_factory):
    """A job that no test changes, its manifest, and its latents as `read_back` gives them."""
    job = default_job(data_dir=tmp_path_factory.mktemp("finished"))
    return job, cache(job), read_back(job.data_dir)


@pytest.fixture(scope="session")
def expected(finished):
    """What an uninterrupted call caches."""
    return finished[2]


@pytest.fixture(scope="session")
def finished_buckets(default_job, tmp_path_factory):
    """The same of a job with BUCKETS."""
    folder = tmp_path_factory.mktemp("finished_buckets")
    job = default_job(buckets=BUCKETS, image_size=24, data_dir=folder)
    return job, cache(job), read_back(folder)


def while_joining(monkeypatch, action):
    """Calls action(size, row) before each latent that a join takes from the parts.

    That method is public, and nothing of its own accord happens at such a moment.
    """
    real = Parts.examples

    def examples(parts, size, moments):
        for row, example in enumerate(real(parts, size, moments)):
            action(size, row)
            yield example

    monkeypatch.setattr(Parts, "examples", examples)


def read_back(data_dir):
    """{configuration: [{feature: array or int}]}, in the order on disk."""
    found = {}
    for folder in find_prepared(data_dir, ["imagenet_latents"]):
        records, info = open_prepared(folder, names=["imagenet_latents"], split="train")
        found[folder.parent.name] = [_parse(records[i], info) for i in range(len(records))]
    return found


def _parse(record, info):
    example = {}
    for name, feature in parse_record(record).items():
        if name == "label":
            example[name] = feature.int64_list.value[0]
        else:
            values = np.frombuffer(feature.bytes_list.value[0], np.float16)
            example[name] = values.reshape(info.features[name].shape)
    return example


def assert_same(found, expected):
    assert found.keys() == expected.keys() and found
    for name in found:
        assert len(found[name]) == len(expected[name])
        for one, other in zip(found[name], expected[name], strict=True):
            assert one.keys() == other.keys()
            for feature in one:
                np.testing.assert_array_equal(one[feature], other[feature])
