"""A small autoencoder whose latents can be foretold, small images, and what was cached of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flowdcn_jax import caching
from flowdcn_jax.autoencoders import Autoencoder
from flowdcn_jax.caching import encoding, parts
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


@pytest.fixture
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


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "_MIN_IMAGES", 6)  # of 20 images: 6, 6, 6 and 2


BUCKETS = AspectBuckets(image_size=24, count=3, min_aspect=0.5, max_aspect=2.0, side_multiple=8)


@pytest.fixture
def make_job(autoencoder, photos, tmp_path):
    """A caching job on the photos; any field of Job can be given."""

    def make_job(*, root=photos, params=None, **overrides):
        fields = dict(
            dataset=f"folder:{root}",
            split="train",
            images=FolderImages(root),
            autoencoder=autoencoder,
            autoencoder_dtype="float32",
            image_size=16,
            buckets=None,
            data_dir=tmp_path / "data",
        )
        if params:
            changed = autoencoder.params | params
            fields["autoencoder"] = dataclasses.replace(autoencoder, params=changed)
        return caching.Job(**fields | overrides)

    return make_job


@pytest.fixture
def cache():
    """caching.cache_latents with every option at a default."""

    def cache(job, **overrides):
        options = dict(batch_size=1, num_threads=2, max_bad=0, shard_index=0, num_shards=1)
        return caching.cache_latents(job, **options | overrides)

    return cache


@pytest.fixture
def expected(make_job, cache, tmp_path):
    """What an uninterrupted call caches."""
    folder = tmp_path / "expected"
    cache(make_job(data_dir=folder))
    return read_back(folder)


def stop_after(monkeypatch, count):
    """The encoder ends the process, in a manner of speaking, at its batch `count`."""
    real, started = encoding.LatentEncoder.start, []

    def start(self, images):
        if len(started) == count:
            raise KeyboardInterrupt
        started.append(len(images))
        return real(self, images)

    monkeypatch.setattr(encoding.LatentEncoder, "start", start)
    return started


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
