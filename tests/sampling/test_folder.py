"""The folder that a sampling run writes: shards, damage, other processes, and what is refused."""

import collections
import contextlib
import errno
import json
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from flowdcn_jax.sampling import SamplingError
from flowdcn_jax.sampling.folder import SampleFolder
from flowdcn_jax.sampling.output_folder import OutputFolder
from flowdcn_jax.sampling.pictures import write_pictures
from tests import tiny

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
    folder._shards.mkdir()  # as if killed before the shards were deleted
    write(folder, 0, 4)
    assert opened(tmp_path).missing() == [] and not folder._shards.exists()


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, opened, monkeypatch):
    folder = opened(tmp_path)
    write(folder, 0, 5)
    real = np.savez

    def full(file, **arrays):
        real(file, **arrays)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(SamplingError, match="No space left .* the same command goes on"):
        write(folder, 5, 10)
    monkeypatch.undo()
    assert names(tmp_path) == [".lock", "settings.json", "shards"]
    assert names(tmp_path / "shards") == ["00000000-00000005.npz"]
    assert opened(tmp_path).missing() == [(5, 10)]


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


def test_all_bytes_of_a_shard_are_checked_when_the_folder_is_opened(tmp_path):
    """Also those that zipfile does not read together with the header."""
    rows = ROWS | {"arr_0": jax.ShapeDtypeStruct((99, 99), np.uint8)}
    for _ in range(2):
        folder = SampleFolder(tmp_path, 5, rows)
        with contextlib.closing(folder):
            folder.open(RECORD)
            assert folder.missing() == [(0, 5)]
            folder.write(0, np.zeros((5, 99, 99), np.uint8), LABELS[:5])
        content = bytearray((tmp_path / FIRST).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / FIRST).write_bytes(content)


def test_no_flipped_bit_gives_a_traceback_or_another_image(tmp_path, opened):
    """Of every byte of a shard and of samples.npz, some bit."""
    folder = opened(tmp_path)
    write(folder, 0, 5, 10)
    path, bits = tmp_path / SECOND, random.Random(0)
    whole, outcomes = path.read_bytes(), collections.Counter()

    def flipped(content, index):
        changed = bytearray(content)
        changed[index] ^= 1 << bits.randrange(8)
        return changed

    for index in range(len(whole)):
        path.write_bytes(flipped(whole, index))
        folder._delete_unusable_shards()
        outcomes[tuple(folder.missing())] += 1
    assert outcomes.keys() == {((5, 10),), ()}  # some bytes mean nothing, as dates
    assert outcomes[()] < 0.2 * len(whole)

    for index in range(0, len(whole), 10):  # damage after the shards were checked
        path.write_bytes(flipped(whole, index))
        try:
            folder.join()
        except SamplingError:
            assert not path.exists() and not folder.samples.exists()
        else:
            check_samples(folder)
            folder.samples.unlink()
            write(folder, 0, 5)

    path.write_bytes(whole)
    folder.join()
    whole = folder.samples.read_bytes()
    for index in range(len(whole)):
        folder.samples.write_bytes(flipped(whole, index))
        try:
            folder._check_samples()
            images = np.stack([image for image, _ in folder.images()])
        except SamplingError as error:
            assert "samples.npz is damaged" in str(error)
        else:
            np.testing.assert_array_equal(images, IMAGES)


def test_shards_that_overlap_or_are_not_what_they_are_named_are_drawn_again(
    tmp_path, opened, caplog
):
    folder = opened(tmp_path / "overlap")
    for start, stop in ((0, 4), (2, 6), (6, 10)):
        write(folder, start, stop)
    with pytest.raises(SamplingError, match="does not hold each of 10 images once"):
        folder.join()
    assert len(names(folder._shards)) == 3 and not folder.samples.exists()
    folder = opened(tmp_path / "overlap")
    assert folder.missing() == [(4, 6)] and "00000002-00000006.npz cannot be" in caplog.text
    write(folder, 4, 6)
    folder.join()
    check_samples(folder)

    folder = opened(tmp_path / "short")
    write(folder, 0, 5, 8)
    (tmp_path / "short" / "shards" / "00000005-00000008.npz").rename(tmp_path / "short" / SECOND)
    shutil.copytree(tmp_path / "short", tmp_path / "again")
    with pytest.raises(SamplingError, match="00000010.npz was damaged .* draws its images again"):
        folder.join()
    assert names(folder._shards) == ["00000000-00000005.npz"] and not folder.samples.exists()
    assert opened(tmp_path / "again").missing() == [(5, 10)]

    folder = opened(tmp_path / "beyond")
    folder.write(8, IMAGES[:4], LABELS[:4])
    assert opened(tmp_path / "beyond").missing() == [(0, 10)]


def test_files_of_other_names_are_left_alone(tmp_path, opened):
    folder = opened(tmp_path)
    write(folder, 0, 10)
    for stray in ("copy-of.npz", "00000000-00000005 (1).npz"):
        (folder._shards / stray).write_bytes(b"mine")
    folder = opened(tmp_path)
    assert folder.missing() == []
    folder.join()
    check_samples(folder)
    assert names(folder._shards) == ["00000000-00000005 (1).npz", "copy-of.npz"]


def test_one_process_writes_at_a_time(tmp_path, opened):
    code = (
        "import sys, pathlib; from flowdcn_jax.sampling.output_folder import OutputFolder\n"
        "folder = OutputFolder(pathlib.Path(sys.argv[1])); folder.open({'seed': 0})\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tiny.REPOSITORY)
    with subprocess.Popen(command, **pipes) as other:
        try:
            assert other.stdout.readline() == b"open\n"
            with pytest.raises(SamplingError, match="is being written by another process; wait"):
                opened(tmp_path, record={"seed": 0})
        finally:
            other.kill()
    assert opened(tmp_path, record={"seed": 0}).missing() == [(0, 10)]


def test_a_file_system_without_locks_is_warned_of(tmp_path, opened, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("flowdcn_jax.sampling.output_folder.fcntl.flock", no_locks)
    assert opened(tmp_path).missing() == [(0, 10)]
    assert "cannot be locked " in caplog.text and "No locks available" in caplog.text


def test_folders_of_other_runs_are_refused(tmp_path, opened):
    write(opened(tmp_path / "out"), 0, 10)
    other = {"guidance": 2.0, "sampler": "euler"}
    with pytest.raises(SamplingError) as caught:
        opened(tmp_path / "out", record=RECORD | {"seed": 1, "settings": other, "guide": {"a": 1}})
    differences = "(seed: 0 -> 1; settings.guidance: 1.375 -> 2.0; guide: None -> {...})"
    assert f"holds another run's images {differences}; use" in str(caught.value)
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


@pytest.mark.parametrize("content", [b"", b"[]", b'{"seed": ', b"\xff"])
def test_damaged_settings_are_named(tmp_path, opened, content):
    write(opened(tmp_path), 0, 10)
    (tmp_path / "settings.json").write_bytes(content)
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


def test_pictures_go_on_where_a_full_disk_stopped_them(tmp_path, opened, monkeypatch):
    folder = opened(tmp_path)
    write(folder, 0, 10)
    folder.join()
    real, written = OutputFolder.save_png, []

    def count(folder, name, image, metadata):
        written.append(name)
        real(folder, name, image, metadata)

    def full(*args):
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_png(*args)

    save_png = sys.modules["flowdcn_jax.sampling.output_folder"].save_png
    monkeypatch.setattr(OutputFolder, "save_png", count)
    with monkeypatch.context() as patch:
        patch.setattr("flowdcn_jax.sampling.output_folder.save_png", full)
        with pytest.raises(SamplingError, match="No space left .* the same command goes on"):
            write_pictures(folder, LABELS, None, {}, save_images=True)
    assert names(tmp_path / "images") == ["00000.png", "00001.png", "00002.png"]
    written.clear()
    write_pictures(folder, LABELS, None, {}, save_images=True)
    assert written == [*(f"images/{i:05d}.png" for i in range(3, 10)), "grid.png"]
    written.clear()
    folder.samples.unlink()  # it need not be read
    write_pictures(folder, LABELS, None, {}, save_images=True)
    assert written == []


def test_the_record_is_readable(tmp_path, opened):
    opened(tmp_path)
    saved = json.loads((tmp_path / "settings.json").read_text())
    assert saved == RECORD | {"size": [4, 6]}
