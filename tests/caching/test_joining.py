"""The way from parts to the data set: kills, damage, hosts without common locks, full disks."""

import dataclasses
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest

from flowdcn_jax.data import DataError
from tests import faults
from tests.caching.conftest import BUCKETS, assert_same, cache, read_back, while_joining
from tests.conftest import FIXTURES


@pytest.fixture
def killed(make_job):
    """A job that was killed when its latents were cached and its parts not yet all removed."""
    job = make_job()
    assert cache(job, shard_index=1, num_shards=2) is None
    parts = shutil.copytree(job.parts_folder, job.data_dir / "parts")
    cache(job)
    parts.rename(job.parts_folder)
    return job


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_parts_that_a_kill_left_beside_the_data_set_are_removed(killed):
    assert names(killed.parts_folder) == ["part-00001.npz", "part-00003.npz", "settings.json"]
    assert cache(killed)["num_examples"] == {"2x2x4": 20}
    assert not killed.parts_folder.exists()


def test_settings_are_the_last_of_the_parts_to_go(killed):
    """As if the kill came again, at what can be removed the least."""
    (killed.parts_folder / "part-00002.npz").mkdir()
    assert cache(killed)["num_examples"] == {"2x2x4": 20}
    assert "settings.json" in names(killed.parts_folder)
    (killed.parts_folder / "part-00002.npz").rmdir()
    cache(killed)
    assert not killed.parts_folder.exists()


def test_parts_of_other_latents_are_not_removed(make_job, autoencoder):
    job = make_job()
    cache(job)
    # The same folder of parts, since the size is the same, and another place for the data set.
    other = make_job(fatal=6, autoencoder=dataclasses.replace(autoencoder, name="o", channels=5))
    assert other.parts_folder == job.parts_folder
    with pytest.raises(KeyboardInterrupt):
        cache(other)
    before = names(other.parts_folder)
    cache(job)
    assert before and names(other.parts_folder) == before


def test_parts_without_settings_are_nobodys(make_job):
    job = make_job()
    assert cache(job, shard_index=1, num_shards=2) is None
    (job.parts_folder / "settings.json").unlink()
    with pytest.raises(DataError, match="holds part-00001.npz, .* and no settings.json; expected"):
        cache(job)


def test_parts_of_the_version_before_are_gone_on_with(make_job, expected):
    """It was stopped after two of its four parts."""
    job = make_job(dataset="folder:photos")
    job.images.fingerprint = "of these photos"
    shutil.copytree(FIXTURES / "stopped", job.data_dir, ignore=lambda *_: ["samples"])
    cache(job, images_per_part=9)  # those that are there keep theirs
    assert job.images.were_read == set(range(12, 20))
    assert_same(read_back(job.data_dir), expected)


def damage(path):
    content = path.read_bytes()
    path.write_bytes(faults.flipped(content, len(content) // 2))


def foreign(path):
    np.savez(path, mean=np.zeros(3))


@pytest.mark.parametrize("harm", [damage, foreign])
def test_damaged_parts_are_named_and_made_again(make_job, expected, caplog, harm):
    with pytest.raises(KeyboardInterrupt):
        cache(make_job(fatal=12))
    job = make_job()
    harm(job.parts_folder / "part-00001.npz")
    cache(job)
    assert "part-00001.npz cannot be used" in caplog.text
    assert job.images.were_read == set(range(6, 20))
    assert_same(read_back(job.data_dir), expected)


def test_a_damaged_part_of_another_share_is_made_again_by_its_command(make_job, expected):
    job = make_job()
    assert cache(job, shard_index=1, num_shards=2) is None
    damage(job.parts_folder / "part-00001.npz")
    message = "part-00001.npz cannot be used .* the command that made its latents makes them again"
    with pytest.raises(DataError, match=message):
        cache(job, shard_index=0, num_shards=2)
    assert cache(job, shard_index=0, num_shards=2) is None
    cache(job, shard_index=1, num_shards=2)
    assert_same(read_back(job.data_dir), expected)


def test_the_data_set_is_on_the_disk_before_the_parts_go(make_job, monkeypatch):
    """What has been flushed can be seen at os.fsync alone."""
    job, flushed, flushed_before, real = make_job(), set(), set(), os.fsync
    folder = job.data_dir / "imagenet_latents" / "2x2x4" / "1.0.0"

    def fsync(descriptor):
        if folder.exists():
            assert len(names(job.parts_folder)) == 5
        (flushed if folder.exists() else flushed_before).add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    cache(job)
    needed = [*folder.iterdir(), folder, folder.parent]
    assert {path.stat().st_ino for path in needed} <= flushed and len(needed) > 4
    (records,) = folder.glob("*.array_record*")  # before the folder takes its place
    assert records.stat().st_ino in flushed_before
    assert not job.parts_folder.exists()


def test_hosts_without_common_locks_may_both_join(make_job, expected, monkeypatch):
    """While this one writes, another one begins to, and is done first.

    What may be another host's is left alone, what has not changed for long is removed.
    """
    job = make_job()
    assert cache(job, shard_index=1, num_shards=2) is None
    faults.without_locks(monkeypatch)
    ((size, data_set),) = ((size, job.folder(size)) for size in job.latent_sizes)
    old, new = (data_set / f"incomplete.{name}_1.0.0" for name in ("OLD", "NEW"))
    for remains in (old, new):
        remains.mkdir(parents=True)
        (remains / "file").touch()
    for path in (old, old / "file"):
        os.utime(path, (time.time() - 3601,) * 2)
    joins = []

    def begin_another(size, row):
        if row == 0:
            joins.append(size)
            assert not old.exists() and new.exists()
            assert len(list(data_set.glob("incomplete.*"))) == 1 + len(joins)
        if len(joins) == 1 and row == 3:
            assert cache(job, shard_index=1, num_shards=2)["num_examples"] == {"2x2x4": 20}
            assert len(joins) == 2 and not job.parts_folder.exists()

    while_joining(monkeypatch, begin_another)
    assert cache(job, num_shards=2)["num_examples"] == {"2x2x4": 20}
    assert joins == [size, size]
    assert_same(read_back(job.data_dir), expected)
    assert not list(data_set.glob("incomplete.*"))


def with_free_disk(monkeypatch, free):
    """A disk with so many free bytes; there is none at hand."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_a_disk_that_is_too_small_is_told_at_the_start(make_job, monkeypatch):
    """20 images of 2x2x4 in float16, twice for the mirror image and for the deviation."""
    moments = 20 * 2 * 2 * 4 * 2 * 2
    job = make_job()
    with_free_disk(monkeypatch, 2 * moments - 1)  # the means alone, and they twice: parts, joined
    with pytest.raises(DataError, match="needs about 2.56e-06 GB more, .* and 2.56e-06 GB are"):
        cache(job)
    assert not job.images.were_read
    with_free_disk(monkeypatch, 2 * 2 * moments - 1 - 6 * 128)  # the deviations as well
    with pytest.raises(DataError, match="needs about .*: make room"):
        cache(job)
    assert names(job.parts_folder) == ["part-00000.npz", "settings.json"]  # it took its space
    with_free_disk(monkeypatch, 2 * 2 * moments - 6 * 128)
    assert cache(job)["num_examples"] == {"2x2x4": 20}


def test_a_join_that_goes_on_needs_no_space_for_what_is_joined(make_job, monkeypatch):
    job = make_job(buckets=BUCKETS, image_size=24)

    def stop_at_the_second(size, row):
        if list((job.data_dir / "imagenet_latents").glob("*/1.0.0")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        while_joining(patch, stop_at_the_second)
        cache(job)
    with_free_disk(monkeypatch, 20 * job.image_bytes - 1)
    assert sum(cache(job)["num_examples"].values()) == 20


def test_a_full_disk_is_one_line_and_goes_on(make_job, expected):
    job = make_job()
    with faults.full_disk(free_bytes=1000):  # less than a part
        with pytest.raises(DataError, match="cannot be read or written: .*File too large.*goes on"):
            cache(job)
    assert names(job.parts_folder) == ["settings.json"]
    cache(job)
    assert_same(read_back(job.data_dir), expected)


@pytest.mark.parametrize(
    "error, message",
    [(OSError(5, "Input/output error"), "Input/output error"), (MemoryError(), "out of memory")],
)
def test_a_machine_that_fails_ends_the_job_and_records_no_image(make_job, error, message):
    with pytest.raises(DataError, match=f"class 1/08.png could .*{message}.* goes on"):
        cache(make_job(fatal=8, error=error), max_bad=9)
    manifest = cache(make_job())
    assert manifest["skipped"] == [] and manifest["num_examples"] == {"2x2x4": 20}
