"""The way from parts to the data set: kills, hosts without common locks, and disks that fill up."""

import contextlib
import dataclasses
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowdcn_jax.caching import joining, parts, space
from flowdcn_jax.data import DataError, DataExistsError
from flowdcn_jax.data.labelled_images import FolderImages
from tests.caching.conftest import BUCKETS, assert_same, read_back, stop_after


def killed_before_removal(monkeypatch, cache, job):
    """Caches a job and ends, in a manner of speaking, when its parts are to be removed."""

    def remove_parts(folder, settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(joining, "remove_parts", remove_parts)
        with pytest.raises(KeyboardInterrupt):
            cache(job)
    assert list(job.parts_folder.glob("part-*"))


def test_parts_that_a_kill_left_beside_the_data_set_are_removed(make_job, cache, monkeypatch):
    job = make_job()
    killed_before_removal(monkeypatch, cache, job)
    assert cache(job)["num_examples"] == {"2x2x4": 20}
    assert not job.parts_folder.exists()


def test_parts_of_other_latents_are_not_removed(make_job, cache, autoencoder, monkeypatch):
    job = make_job()
    cache(job)
    # The same folder of parts, since the size is the same, and another place for the data set.
    other = make_job(autoencoder=dataclasses.replace(autoencoder, name="other", channels=5))
    assert other.parts_folder == job.parts_folder
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        stop_after(patch, 1)
        cache(other)
    before = sorted(other.parts_folder.iterdir())
    cache(job)
    assert before and sorted(other.parts_folder.iterdir()) == before


def test_parts_without_settings_are_nobodys(make_job, cache, monkeypatch):
    job = make_job()
    killed_before_removal(monkeypatch, cache, job)
    shutil.rmtree(job.data_dir / "imagenet_latents")
    (job.parts_folder / "settings.json").unlink()
    with pytest.raises(DataExistsError, match="holds parts without settings.json"):
        cache(job)


def test_settings_are_the_last_of_the_parts_to_go(make_job, cache, monkeypatch):
    job = make_job()
    killed_before_removal(monkeypatch, cache, job)
    real, left = Path.unlink, []

    def unlink(path, **options):
        left.append((job.parts_folder / "settings.json").exists())
        real(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    parts.remove_parts(job.parts_folder, job.settings)
    assert left == [True] * 4 and not job.parts_folder.exists()


def test_the_data_set_is_on_the_disk_before_the_parts_go(make_job, cache, monkeypatch):
    job, flushed, flushed_before, real = make_job(), set(), set(), os.fsync
    folder = job.data_dir / "imagenet_latents" / "2x2x4" / "1.0.0"

    def fsync(descriptor):
        (flushed if folder.exists() else flushed_before).add(os.fstat(descriptor).st_ino)
        real(descriptor)

    def remove_parts(*args):
        needed = [*folder.iterdir(), folder, folder.parent]
        assert {path.stat().st_ino for path in needed} <= flushed and len(needed) > 4
        (records,) = folder.glob("*.array_record*")  # before the folder takes its place
        assert records.stat().st_ino in flushed_before
        flushed.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(joining, "remove_parts", remove_parts)
    cache(job)
    assert not flushed


def test_parts_keep_their_number_of_images(make_job, cache, monkeypatch, expected):
    job = make_job()
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        stop_after(patch, 2)
        cache(job)
    monkeypatch.setattr(parts, "_MIN_IMAGES", 9)
    cache(job)
    assert_same(read_back(job.data_dir), expected)


def test_hosts_whose_locks_do_not_reach_each_other_may_both_join(
    make_job, cache, expected, monkeypatch
):
    """While this one writes, another one begins to, and is done first."""
    job = make_job()
    assert cache(job, shard_index=1, num_shards=2) is None
    monkeypatch.setattr(joining, "_lock", lambda folder: contextlib.nullcontext())
    real, calls = parts.Parts.examples, []

    def examples(self, size, names):
        calls.append(size)
        for row, example in enumerate(real(self, size, names)):
            if len(calls) == 2 and row == 0:
                assert len(list(job.folder(size).glob("incomplete.*"))) == 2
            if len(calls) == 1 and row == 3:
                assert cache(job, shard_index=1, num_shards=2)["num_examples"] == {"2x2x4": 20}
                assert len(calls) == 2 and not job.parts_folder.exists()
            yield example

    monkeypatch.setattr(parts.Parts, "examples", examples)
    assert cache(job, num_shards=2)["num_examples"] == {"2x2x4": 20}
    assert len(calls) == 2
    assert_same(read_back(job.data_dir), expected)
    assert not list((job.data_dir / "imagenet_latents").rglob("incomplete.*"))


def test_what_another_host_may_be_writing_is_left_alone(tmp_path):
    remains = tmp_path / "incomplete.ABCDEF_1.0.0"
    remains.mkdir()
    (remains / "file").touch()
    joining._remove_remains(tmp_path, unchanged_s=100)
    assert remains.exists()
    for path in (remains, remains / "file"):
        os.utime(path, (time.time() - 101,) * 2)
    joining._remove_remains(tmp_path, unchanged_s=100)
    assert not remains.exists()


def test_file_systems_without_locks_will_do(make_job, cache, expected, monkeypatch):
    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(joining.fcntl, "flock", flock)
    job = make_job()
    cache(job)
    assert_same(read_back(job.data_dir), expected)


def test_a_disk_that_is_too_small_is_told_at_the_start(make_job, cache, monkeypatch):
    """20 images of 2x2x4 in float16, twice for the mirror image and for the deviation."""
    moments = 20 * 2 * 2 * 4 * 2 * 2
    encoded = stop_after(monkeypatch, 100)

    def cache_with_free(job, free):
        monkeypatch.setattr(space.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        encoded.clear()
        return cache(job)

    job = make_job()
    message = "needs about 2.56e-06 GB more, .* and 2.56e-06 GB are free"
    with pytest.raises(DataError, match=message):  # the means alone, and they twice: parts, joined
        cache_with_free(job, 2 * moments - 1)
    assert not encoded
    with pytest.raises(DataError, match="needs about .*: make room"):  # the deviations as well
        cache_with_free(job, 2 * 2 * moments - 1 - 6 * 128)
    assert sum(encoded) == 6  # which took their space
    assert cache_with_free(job, 2 * 2 * moments - 6 * 128)["num_examples"] == {"2x2x4": 20}


def test_a_join_that_goes_on_needs_no_space_for_what_is_joined(make_job, cache, monkeypatch):
    job = make_job(buckets=BUCKETS, image_size=24)
    real = joining.write_latents

    def write_latents(examples, **options):
        if list((job.data_dir / "imagenet_latents").glob("*/1.0.0")):
            raise KeyboardInterrupt
        return real(examples, **options)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(joining, "write_latents", write_latents)
        cache(job)
    free = SimpleNamespace(free=20 * job.image_bytes - 1)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: free)
    assert sum(cache(job)["num_examples"].values()) == 20


def test_a_machine_that_fails_ends_the_job_and_records_no_image(make_job, cache, monkeypatch):
    job, real = make_job(), FolderImages.read
    for error, message in (
        (OSError(5, "Input/output error"), "Input/output error"),
        (MemoryError(), "out of memory"),
    ):

        def read(images, index, error=error):
            if index == 8:
                raise error
            return real(images, index)

        with monkeypatch.context() as patch:
            patch.setattr(FolderImages, "read", read)
            with pytest.raises(DataError, match=f"class 1/08.png could .*{message}.* goes on"):
                cache(job, max_bad=9)
    manifest = cache(job)
    assert manifest["skipped"] == [] and manifest["num_examples"] == {"2x2x4": 20}
