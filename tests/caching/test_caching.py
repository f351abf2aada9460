"""What is cached, and that it is the same however the work is stopped, shared and resumed."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from flowdcn_jax import caching
from flowdcn_jax.autoencoders import load_autoencoder
from flowdcn_jax.caching.encoding import LatentEncoder
from flowdcn_jax.caching.parts import LatentStatistics
from flowdcn_jax.data import DataError, DataExistsError, make_batches, make_source
from flowdcn_jax.data.aspect_buckets import AspectBuckets
from flowdcn_jax.data.image_files import centre_crop
from tests.caching.conftest import (
    BUCKETS,
    STRIDE,
    assert_same,
    cache,
    latent_moments,
    photo,
    read_back,
    while_joining,
)
from tests.data.image_files import JPEG, bomb


def config(data_dir, **overrides):
    import ml_collections

    from configs import default

    section = default.get_config().data.to_dict()
    section |= dict(name="latents", data_dir=str(data_dir), image_size=16)
    return ml_collections.ConfigDict(section | overrides)


def test_latents_are_those_of_each_image_and_of_its_mirror_image(finished):
    job, manifest, latents = finished
    (examples,) = latents.values()
    assert len(examples) == 20
    crops = np.stack([centre_crop(Image.fromarray(photo(index)), 16) for index in range(20)])
    views = {"": latent_moments(crops), "_flipped": latent_moments(crops[:, :, ::-1])}
    for index, example in enumerate(examples):
        assert example["label"] == index // 8
        for suffix, (mean, std) in views.items():
            np.testing.assert_allclose(example[f"mean{suffix}"], mean[index], atol=1e-3)
            np.testing.assert_allclose(example[f"std{suffix}"], std[index], atol=1e-3)
    assert manifest["num_examples"] == {"2x2x4": 20} and manifest["skipped"] == []
    assert manifest["settings"]["autoencoder"]["weights_sha256"] == "0123"
    folder = job.data_dir / "imagenet_latents" / "2x2x4" / "1.0.0"
    assert json.loads((folder / "metadata.json").read_text()) == manifest
    assert not list(job.data_dir.glob("incomplete*"))
    source = make_source(config(job.data_dir))
    assert source.class_names == ("class 0", "class 1", "class 2") and source.flips


def test_a_batch_has_as_many_pixels_as_the_default(autoencoder):
    encoder = LatentEncoder(autoencoder, mirrored=True, batch_size=None)
    devices = len(jax.local_devices())
    rows = [encoder.rows(side, side) // devices for side in (256, 512, 4096)]
    assert rows == [16, 4, 1]  # as --help says


def test_statistics_are_those_of_the_drawn_latents(finished):
    _, manifest, latents = finished
    (examples,) = latents.values()
    views = [(e[f"mean{s}"], e[f"std{s}"]) for e in examples for s in ("", "_flipped")]
    mean, std = (np.stack(moment).astype(np.float64) for moment in zip(*views, strict=True))
    axes = (0, 1, 2)
    np.testing.assert_allclose(manifest["statistics"]["mean"], mean.mean(axes), rtol=1e-12)
    variance = mean.var(axes) + (std**2).mean(axes)
    np.testing.assert_allclose(manifest["statistics"]["std"], np.sqrt(variance), rtol=1e-12)


def test_statistics_keep_their_digits_over_many_images():
    statistics = LatentStatistics()
    large = np.full((1000, 8, 8, 1), 300.0, np.float16)
    for _ in range(50):
        statistics = statistics.and_of(large, np.full_like(large, 0.001))
    std = float(np.float16(0.001))
    np.testing.assert_allclose(statistics.summary()["std"], [std], rtol=1e-3)


def test_a_stopped_job_goes_on_where_it_was(make_job, expected):
    with pytest.raises(KeyboardInterrupt):
        cache(make_job(fatal=12))
    job = make_job()
    assert len(list(job.parts_folder.glob("part-*.npz"))) == 2
    assert not list(job.data_dir.glob("imagenet_latents/*"))
    cache(job)
    assert job.images.were_read == set(range(12, 20))
    assert_same(read_back(job.data_dir), expected)


def test_latents_do_not_depend_on_the_parts(make_job, expected):
    """One part of several batches, more than are on their way at a time."""
    job = make_job()
    cache(job, images_per_part=20)
    assert_same(read_back(job.data_dir), expected)


def test_what_is_cached_is_left_alone(default_job, finished):
    job, manifest, _ = finished
    again = default_job(data_dir=job.data_dir)
    assert cache(again) == manifest and not again.images.were_read


def test_a_stopped_join_leaves_nothing_that_looks_whole(make_job, monkeypatch):
    job, written = make_job(buckets=BUCKETS, image_size=24), set()

    def stop_at_the_second(size, row):
        written.add(job.config_name(size))
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        while_joining(patch, stop_at_the_second)
        cache(job)
    folder = job.data_dir / "imagenet_latents"
    (first,) = [path.parent.name for path in folder.glob("*/1.0.0")]
    assert first in written
    with pytest.raises(DataError, match="not all there"):
        make_source(config(job.data_dir, image_size=24, random_flip=False, aspect_buckets=SECTION))

    remains = folder / "bucket_2x4x4" / "incomplete.ABCDEF_1.0.0"  # as a kill leaves it
    remains.mkdir(parents=True)
    job.images.were_read.clear()
    manifest = cache(job)
    assert not job.images.were_read and not remains.exists()
    assert read_back(job.data_dir).keys() == manifest["num_examples"].keys()


@pytest.mark.parametrize("num_shards", [2, 3, 7])
def test_shares_are_joined_by_the_last(make_job, expected, num_shards):
    job = make_job()
    for index in reversed(range(1, num_shards)):
        assert cache(job, shard_index=index, num_shards=num_shards) is None
    assert not read_back(job.data_dir)
    manifest = cache(job, shard_index=0, num_shards=num_shards)
    assert manifest["num_examples"] == {"2x2x4": 20}
    assert_same(read_back(job.data_dir), expected)
    assert cache(job, shard_index=1, num_shards=num_shards) == manifest


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(autoencoder_dtype="bfloat16"), "autoencoder.dtype: 'float32' -> 'bfloat16'"),
        (dict(dataset="folder:/elsewhere"), "dataset: .* -> 'folder:/elsewhere'"),
    ],
)
def test_other_latents_are_not_mixed_in(make_job, change, message):
    with pytest.raises(KeyboardInterrupt):
        cache(make_job(fatal=6))
    begun = f"holds another run's latents .settings.{message}.; .* or another --data_dir"
    with pytest.raises(DataError, match=begun):
        cache(make_job(**change))
    cache(make_job())
    other = f"holds other latents .{message}.: name another --data_dir, one for each split"
    with pytest.raises(DataExistsError, match=other):
        cache(make_job(**change))


def test_latents_of_two_sizes_lie_side_by_side(make_job):
    with pytest.raises(KeyboardInterrupt):
        cache(make_job(fatal=6))
    assert cache(make_job(image_size=24))["num_examples"] == {"3x3x4": 20}
    assert cache(make_job())["num_examples"] == {"2x2x4": 20}
    assert read_back(make_job().data_dir).keys() == {"2x2x4", "3x3x4"}


def hostile(root):
    """Three good images among bad ones of every kind; returns the names of the bad."""
    folder = root / "a"
    folder.mkdir(parents=True)
    for index, name in enumerate(["00.png", "99.png"]):
        Image.fromarray(photo(index)).save(folder / name)
    Image.new("RGB", (30_000, 40), "red").save(folder / "wide.png")
    (root / "b").mkdir()
    bad = {
        "10.jpg": b"",
        "20.jpg": JPEG[: len(JPEG) // 2],
        "30.jpg": b"a text file",
        "40.png": bomb(),
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    (folder / "50.jpg").symlink_to(folder / "50.jpg")
    (folder / "again").symlink_to(folder)
    return [f"a/{name}" for name in (*bad, "50.jpg")]


def test_bad_images_are_listed_and_skipped(make_job, tmp_path, capsys):
    bad = hostile(tmp_path / "hostile")
    job = make_job(root=tmp_path / "hostile")
    manifest = cache(job, max_bad=5)
    assert [entry["name"] for entry in manifest["skipped"]] == bad
    reasons = " | ".join(entry["reason"] for entry in manifest["skipped"])
    for part in ("empty", "truncated", "not an image", "DecompressionBomb", "cannot be read"):
        assert part in reasons
    assert "skipped a/10.jpg: the file is empty" in capsys.readouterr().err
    assert any("classes without images" in note for note in manifest["notes"])
    (examples,) = read_back(job.data_dir).values()
    crops = [centre_crop(Image.fromarray(photo(index)), 16) for index in range(2)]
    crops.append(np.broadcast_to(np.array([255, 0, 0], np.uint8), (16, 16, 3)))
    found = np.stack([example["mean"] for example in examples])
    np.testing.assert_allclose(found, latent_moments(crops)[0], atol=1e-3)


def test_too_many_bad_images_stop_the_job_and_a_higher_limit_goes_on(make_job, tmp_path):
    hostile(tmp_path / "hostile")
    job = make_job(root=tmp_path / "hostile")
    for _ in range(2):
        with pytest.raises(caching.TooManyBadError, match="3 images .*max_bad=2.*a/30.jpg: not"):
            cache(job, max_bad=2)
    assert len(cache(job, max_bad=5)["skipped"]) == 5


def test_the_limit_holds_over_all_shares(make_job, tmp_path):
    root = tmp_path / "root"
    for index in range(14):
        path = root / "a" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index in (0, 7):
            path.touch()
        else:
            Image.fromarray(photo(index)).save(path)
    job = make_job(root=root)
    assert cache(job, shard_index=0, num_shards=2, max_bad=1) is None
    with pytest.raises(caching.TooManyBadError, match="2 images cannot be used"):
        cache(job, shard_index=1, num_shards=2, max_bad=1)
    assert cache(job, shard_index=1, num_shards=2, max_bad=2)["num_examples"] == {"2x2x4": 12}


def test_not_one_good_image_is_an_error(make_job, tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "1.png").touch()
    with pytest.raises(DataError, match="not one image .* could be used.*the file is empty"):
        cache(make_job(root=tmp_path / "root"), max_bad=9)


def test_values_that_float16_cannot_hold_name_the_image(make_job):
    with pytest.raises(
        DataError, match="class 0/00.png: the autoencoder gives values that float16"
    ):
        cache(make_job(params={"gain": np.float32(1e6)}))


def test_a_deterministic_autoencoder_needs_no_std(make_job):
    job = make_job(params={"spread": np.float32(0)})
    cache(job)
    (examples,) = read_back(job.data_dir).values()
    assert examples[0].keys() == {"mean", "mean_flipped", "label"}
    source = make_source(config(job.data_dir, random_flip=True))
    batch = next(make_batches(source, batch_size=200, seed=0, num_threads=0, prefetch_batches=0))
    stored = {
        0.5 * (e[name].astype(np.float32) - 0.25).sum()  # scale, shift
        for e in examples
        for name in e
        if name[0] == "m"
    }
    drawn = batch["image"].sum(axis=(1, 2, 3))
    assert np.isclose(drawn[:, None], sorted(stored), rtol=1e-5).any(axis=1).all()
    assert len(np.unique(drawn.round(3))) > 20  # both views of each are seen


SECTION = dict(count=3, min_aspect=0.5, max_aspect=2.0, side_multiple=8)


def test_each_image_is_cached_in_its_bucket_without_its_mirror_image(finished_buckets):
    _, manifest, found = finished_buckets
    nearest = [BUCKETS.nearest(*photo(index).shape[:2]) for index in range(20)]
    for height, width in BUCKETS.sizes:
        name = f"bucket_{height // STRIDE}x{width // STRIDE}x4"
        labels = [index // 8 for index in range(20) if nearest[index] == (height, width)]
        assert [example["label"] for example in found[name]] == labels
        assert manifest["num_examples"][name] == len(labels) > 0
        assert found[name][0].keys() == {"mean", "std", "label"}
        assert found[name][0]["mean"].shape == (height // STRIDE, width // STRIDE, 4)


def test_crops_of_buckets_do_not_depend_on_who_makes_them(make_job, finished_buckets):
    job = make_job(buckets=BUCKETS, image_size=24)
    cache(job, shard_index=1, num_shards=2, batch_size=3)
    cache(job, shard_index=0, num_shards=2, num_threads=1)
    assert_same(read_back(job.data_dir), finished_buckets[2])


def test_windows_of_equal_images_lie_at_different_places(make_job, tmp_path):
    wide = Image.fromarray(photo(0)).resize((200, 16))
    (tmp_path / "root" / "a").mkdir(parents=True)
    for index in range(6):
        wide.save(tmp_path / "root" / "a" / f"{index}.png")
    job = make_job(root=tmp_path / "root", buckets=BUCKETS, image_size=24)
    cache(job)
    (examples,) = read_back(job.data_dir).values()
    assert len({example["mean"].tobytes() for example in examples}) == 6


def test_sizes_that_do_not_fit_the_autoencoder_are_refused(make_job):
    with pytest.raises(DataError, match="18x18 pixels do not fit .*expected multiples of 8"):
        make_job(image_size=18)


def test_a_real_photo_gives_the_latents_of_the_reference(make_job, fixture_file, tmp_path):
    """TAEF2's own output for a photo, through a PNG, a bucket of its size and float16."""
    from ml_collections import ConfigDict

    folder = os.environ.get("FLOWDCN_TEST_DATA")
    if not folder or not Path(folder, "taef2_encoder.safetensors").exists():
        pytest.skip("set FLOWDCN_TEST_DATA to the folder of taef2_{encoder,decoder}.safetensors")
    golden = fixture_file("taef2.npz")
    pixels = np.rint(golden["x"][0].transpose(1, 2, 0) * 255).astype(np.uint8)
    path = tmp_path / "root" / "a" / "photo.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)
    taef2 = ConfigDict(dict(name="taef2", weights=folder, downsampling=8, dtype="float32"))
    job = make_job(
        root=tmp_path / "root",
        autoencoder=load_autoencoder(taef2),
        image_size=157,
        buckets=AspectBuckets(
            image_size=157, count=1, min_aspect=1.5, max_aspect=1.5, side_multiple=16
        ),
    )
    cache(job)
    ((example,),) = read_back(job.data_dir).values()
    latent = golden["latent"][0].transpose(1, 2, 0)
    assert example.keys() == {"mean", "label"}
    np.testing.assert_allclose(example["mean"], latent, atol=2e-3)  # float16 of values up to 4
