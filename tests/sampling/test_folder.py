"""The folder that a sampling run writes: shards, damage, other processes, and what is refused."""

import collections
import contextlib
import json
import random
import shutil

import jax
import numpy as np
import pytest

from flowdcn_jax.sampling import SamplingError
from flowdcn_jax.sampling.folder import SampleFolder
from flowdcn_jax.sampling.pictures import write_pictures
from tests import faults
from tests.conftest import FIXTURES

RECORD = {"seed": 0, "size": (4, 6), "settings": {"guidance": 1.375, "sampler": "euler"}}
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), np.uint8)
LABELS = np.arange(10, dtype=np.int32)
ROWS = {
    "arr_0": jax.ShapeDtypeStruct((4, 6, 3), np.uint8),
    "arr_1": jax.ShapeDtypeStruct((), np.int32),
}
FIRST, SECOND = "shards/00000000-00000005.npz", "shards/00000005-00000010.npz"


@pytest.fixture(autouse=True)
def opened():
    """Opens a folder, as a new process would: the one before is closed."""
    last = []

    def open_folder(path, record=RECORD):
        while last:
            last.pop().close()
        last.append(SampleFolder(path, 10, ROWS))
        last[0].open(record)
        return last[0]

    yield open_folder
    for folder in last:
        folder.close()


def write(folder, *edges):
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        folder.write(start, IMAGES[start:stop], LABELS[start:stop])


def check_samples(folder):
    with np.load(folder.samples, allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
        np.testing.assert_array_equal(file["arr_1"], LABELS)


def names(path):
    return sorted(path.name for path in path.iterdir())


def test_shards_of_any_size_are_joined_and_deleted(tmp_path, opened):
    folder = opened(tmp_path / "out")
    assert folder.missing() == [(0, 10)]
    write(folder, 0, 3)
    write(folder, 7, 10)
    folder = opened(tmp_path / "out")
    assert folder.missing() == [(3, 7)]
    write(folder, 3, 7)
    assert folder.missing() == []
    folder.join()
    assert names(tmp_path / "out") == [".lock", "samples.npz", "settings.json"]
    check_samples(folder)
    rows = list(folder.images())
    np.testing.assert_array_equal(np.stack([image for image, _ in rows]), IMAGES)
    assert [label for _, label in rows] == LABELS.tolist()
    again = opened(tmp_path / "out")
    assert again.missing() == []
    again.join()


def test_the_joined_file_does_not_depend_on_the_shards(tmp_path, opened):
    for name, edges in (("a", (0, 4, 10)), ("b", (0, 9, 10))):
        folder = opened(tmp_path / name)
        write(folder, *edges)
        folder.join()
    first, second = ((tmp_path / name / "samples.npz").read_bytes() for name in "ab")
    assert first == second


def test_leftovers_of_killed_writes_are_removed(tmp_path, opened):
    write(opened(tmp_path), 0, 10)
    (tmp_path / "images").mkdir()
    for leftover in (
        ".samples.npz.x1",
        "shards/.00000000.npz.x2",
        ".settings.json.x3",
        ".grid.png.x4",
        ".compare_steps.png.x5",
        "images/.00000.png.x6",
    ):
        (tmp_path / leftover).write_bytes(b"half")
    (tmp_path / ".mine.npz.swp").write_bytes(b"someone's")
    folder = opened(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob(".*")) == [".lock", ".mine.npz.swp"]
    folder.join()
    write(folder, 0, 4)  # as if killed before the shards were deleted
    assert opened(tmp_path).missing() == [] and not (tmp_path / "shards").exists()


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, opened):
    folder = opened(tmp_path)
    write(folder, 0, 5)
    with faults.full_disk(free_bytes=100):
        with pytest.raises(SamplingError, match="File too large.* the same command goes on"):
            write(folder, 5, 10)
    assert names(tmp_path) == [".lock", "settings.json", "shards"]
    assert names(tmp_path / "shards") == ["00000000-00000005.npz"]
    assert opened(tmp_path).missing() == [(5, 10)]
    write(folder, 5, 10)
    with faults.full_disk(free_bytes=100):
        with pytest.raises(SamplingError, match="File too large.* the same command goes on"):
            folder.join()
    assert names(tmp_path / "shards") == ["00000000-00000005.npz", "00000005-00000010.npz"]
    folder.join()
    check_samples(folder)


@pytest.mark.parametrize("shard", [FIRST, SECOND])
@pytest.mark.parametrize("keep", [0.0, 0.5, None])
def test_a_damaged_shard_is_deleted_and_drawn_by_the_same_call(
    tmp_path, opened, caplog, shard, keep
):
    write(opened(tmp_path), 0, 5, 10)
    path = tmp_path / shard
    content = bytearray(path.read_bytes())
    if keep is None:
        content[len(content) // 3] ^= 1
    else:
        del content[int(keep * len(content)) :]
    path.write_bytes(content)
    folder = opened(tmp_path)
    assert f"{path} cannot be used" in caplog.text and not path.exists()
    [(start, stop)] = folder.missing()
    assert shard == f"shards/{start:08d}-{stop:08d}.npz"
    write(folder, start, stop)
    folder.join()
    check_samples(folder)


def test_no_flipped_bit_in_a_shard_gives_a_traceback_or_another_image(tmp_path):
    """Of every byte of a shard, some bit: each in a shard of its own, all opened at once."""
    row, label, bits = IMAGES[:1], LABELS[:1], random.Random(0)
    with contextlib.closing(SampleFolder(tmp_path / "one", 1, ROWS)) as folder:
        folder.open(RECORD)
        folder.write(0, row, label)
        whole = (tmp_path / "one" / "shards" / "00000000-00000001.npz").read_bytes()
    with contextlib.closing(SampleFolder(tmp_path / "all", len(whole), ROWS)) as folder:
        folder.open(RECORD)
    paths = [tmp_path / "all" / f"shards/{i:08d}-{i + 1:08d}.npz" for i in range(len(whole))]
    paths[0].parent.mkdir()
    for index, path in enumerate(paths):
        path.write_bytes(faults.flipped(whole, index, bits.randrange(8)))
    with contextlib.closing(SampleFolder(tmp_path / "all", len(whole), ROWS)) as folder:
        folder.open(RECORD)
        there = [path for path in paths if path.exists()]
        assert 0 < len(there) < 0.3 * len(whole)  # some bytes mean nothing, as dates
        for path in set(paths) - set(there):
            path.write_bytes(whole)
        folder.join()
        for image, found in folder.images():
            assert (image == row[0]).all() and found == label[0]


def test_no_flipped_bit_that_shows_later_gives_a_traceback_or_another_image(tmp_path):
    """In a shard that is joined after it was checked, and of every byte of samples.npz."""
    images, labels, bits = IMAGES[:4, :2, :2], LABELS[:4], random.Random(0)
    rows = ROWS | {"arr_0": jax.ShapeDtypeStruct((2, 2, 3), np.uint8)}
    folder = SampleFolder(tmp_path, 4, rows)
    with contextlib.closing(folder):
        folder.open(RECORD)
        folder.write(0, images[:2], labels[:2])
        folder.write(2, images[2:], labels[2:])
        path, outcomes = tmp_path / "shards" / "00000002-00000004.npz", collections.Counter()
        whole = path.read_bytes()
        for index in range(0, len(whole), 10):
            path.write_bytes(faults.flipped(whole, index, bits.randrange(8)))
            try:
                folder.join()
            except SamplingError:
                assert not path.exists() and not folder.samples.exists()
                outcomes["deleted"] += 1
            else:
                found = np.stack([image for image, _ in folder.images()])
                np.testing.assert_array_equal(found, images)
                folder.samples.unlink()
                folder.write(0, images[:2], labels[:2])
                outcomes["joined"] += 1
        assert outcomes["deleted"] > 0.8 * outcomes["joined"] > 0
        path.write_bytes(whole)
        folder.join()

    whole = folder.samples.read_bytes()
    for index in range(len(whole)):
        folder.samples.unlink()
        folder.samples.write_bytes(faults.flipped(whole, index, bits.randrange(8)))
        with contextlib.closing(SampleFolder(tmp_path, 4, rows)) as folder:
            try:
                if index % 10 == 0:
                    folder.open(RECORD)
                found = np.stack([image for image, _ in folder.images()])
            except SamplingError as error:
                assert "samples.npz is damaged" in str(error)
            else:
                np.testing.assert_array_equal(found, images)


def test_shards_that_overlap_or_are_not_what_they_are_named_are_drawn_again(
    tmp_path, opened, caplog
):
    folder = opened(tmp_path / "overlap")
    for start, stop in ((0, 4), (2, 6), (6, 10)):
        write(folder, start, stop)
    with pytest.raises(SamplingError, match="does not hold each of 10 images once"):
        folder.join()
    assert len(names(folder.path / "shards")) == 3 and not folder.samples.exists()
    folder = opened(tmp_path / "overlap")
    assert folder.missing() == [(4, 6)] and "00000002-00000006.npz cannot be" in caplog.text
    write(folder, 4, 6)
    folder.join()
    check_samples(folder)

    folder = opened(tmp_path / "short")
    write(folder, 0, 5, 8)
    (tmp_path / "short" / "shards" / "00000005-00000008.npz").rename(tmp_path / "short" / SECOND)
    shutil.copytree(tmp_path / "short", tmp_path / "again")
    with pytest.raises(SamplingError, match="00000010.npz cannot be .* made its images makes them"):
        folder.join()
    assert (
        names(folder.path / "shards") == ["00000000-00000005.npz"] and not folder.samples.exists()
    )
    assert opened(tmp_path / "again").missing() == [(5, 10)]

    folder = opened(tmp_path / "beyond")
    folder.write(8, IMAGES[:4], LABELS[:4])
    assert opened(tmp_path / "beyond").missing() == [(0, 10)]


def test_files_of_other_names_are_left_alone(tmp_path, opened):
    folder = opened(tmp_path)
    write(folder, 0, 10)
    for stray in ("copy-of.npz", "00000000-00000005 (1).npz"):
        (tmp_path / "shards" / stray).write_bytes(b"mine")
    folder = opened(tmp_path)
    assert folder.missing() == []
    folder.join()
    check_samples(folder)
    assert names(tmp_path / "shards") == ["00000000-00000005 (1).npz", "copy-of.npz"]


def test_one_process_writes_at_a_time(tmp_path, opened):
    opened(tmp_path)
    with pytest.raises(SamplingError, match="is in use by another run .*: wait for it, or name"):
        SampleFolder(tmp_path, 10, ROWS).open(RECORD)
    assert opened(tmp_path).missing() == [(0, 10)]


def test_a_folder_of_the_version_before_goes_on(tmp_path, opened):
    """It was stopped after its first shard."""
    shutil.copytree(FIXTURES / "stopped" / "samples", tmp_path, dirs_exist_ok=True)
    folder = opened(tmp_path)
    assert folder.missing() == [(5, 10)]
    write(folder, 5, 10)
    folder.join()
    check_samples(folder)


def test_folders_of_other_runs_are_refused(tmp_path, opened):
    write(opened(tmp_path / "out"), 0, 10)
    with pytest.raises(
        SamplingError, match=r"another run's images \(seed: 0 -> 1\); .* another --out"
    ):
        opened(tmp_path / "out", record=RECORD | {"seed": 1})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SamplingError, match="file cannot be made a folder"):
        opened(tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("mine")
    assert opened(tmp_path / "notes").missing() == [(0, 10)]


@pytest.mark.parametrize("found", ["samples.npz", "shards", "grid.png", "images", "compare_x.png"])
def test_results_without_settings_are_refused(tmp_path, opened, found):
    (tmp_path / found).write_bytes(b"mine")
    with pytest.raises(SamplingError, match=f"holds {found} and no settings.json; expected a new"):
        opened(tmp_path)
    assert names(tmp_path) == [found]


def test_damaged_settings_are_named(tmp_path, opened):
    write(opened(tmp_path), 0, 10)
    (tmp_path / "settings.json").write_bytes(b'{"seed": ')
    with pytest.raises(SamplingError, match="settings.json is damaged .* use another --out, or"):
        opened(tmp_path)
    assert names(tmp_path / "shards") == ["00000000-00000010.npz"]


def test_damaged_samples_are_named_and_drawn_again_once_removed(tmp_path, opened):
    folder = opened(tmp_path)
    write(folder, 0, 10)
    folder.join()
    write(folder, 0, 5)  # as if killed before the shards were deleted
    whole = folder.samples.read_bytes()
    for damaged in (b"", whole[:100]):
        folder.samples.write_bytes(damaged)
        with pytest.raises(SamplingError, match="samples.npz is damaged .* or remove it, and the"):
            opened(tmp_path)
    folder.samples.unlink()
    assert opened(tmp_path).missing() == [(5, 10)]


def test_a_folder_of_other_images_is_not_taken_for_this_run(tmp_path, opened):
    folder = opened(tmp_path)
    np.savez(folder.samples, arr_0=IMAGES[:, :, :3], arr_1=LABELS)
    with pytest.raises(SamplingError, match=r"samples.npz is damaged .*arr_0 is .*\(10, 4, 3, 3\)"):
        opened(tmp_path)


def test_pictures_go_on_where_a_full_disk_stopped_them(tmp_path, opened):
    """The first three images are of one colour: their files are smaller than those of noise."""
    rows = ROWS | {"arr_0": jax.ShapeDtypeStruct((16, 16, 3), np.uint8)}
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)
    images[:3] = 0
    with contextlib.closing(SampleFolder(tmp_path, 10, rows)) as folder:
        folder.open(RECORD)
        folder.write(0, images, LABELS)
        folder.join()
        with faults.full_disk(free_bytes=500):
            with pytest.raises(SamplingError, match="File too large.* the same command goes on"):
                write_pictures(folder, LABELS, None, {}, save_images=True)
        assert names(tmp_path / "images") == ["00000.png", "00001.png", "00002.png"]
        first = written(tmp_path)
        write_pictures(folder, LABELS, None, {}, save_images=True)
        pictures = written(tmp_path)
        assert pictures.keys() == {"grid.png", *(f"{index:05d}.png" for index in range(10))}
        assert pictures.items() > first.items()
        folder.samples.unlink()  # it need not be read
        write_pictures(folder, LABELS, None, {}, save_images=True)
        assert written(tmp_path) == pictures


def written(path):
    """When each picture was written."""
    return {picture.name: picture.stat().st_mtime_ns for picture in path.rglob("*.png")}


def test_the_record_is_readable(tmp_path, opened):
    opened(tmp_path)
    saved = json.loads((tmp_path / "settings.json").read_text())
    assert saved == RECORD | {"size": [4, 6]}
