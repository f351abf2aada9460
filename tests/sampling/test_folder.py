"""The folder of images: shards, gaps, damage, and what is refused."""

import errno

import numpy as np
import pytest

from flowdcn_jax.sampling import SamplingError
from flowdcn_jax.sampling.folder import SampleFolder

RECORD = {"seed": 0, "size": (4, 6)}
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), np.uint8)
LABELS = np.arange(10, dtype=np.int32)


def opened(path, num_images=10, record=RECORD):
    folder = SampleFolder(path, num_images)
    folder.open(record)
    return folder


def write(folder, start, stop):
    folder.write(start, {"arr_0": IMAGES[start:stop], "arr_1": LABELS[start:stop]})


def test_shards_of_any_size_are_joined_and_deleted(tmp_path):
    folder = opened(tmp_path / "out")
    assert folder.missing() == [(0, 10)]
    write(folder, 0, 3)
    write(folder, 7, 10)
    assert opened(tmp_path / "out").missing() == [(3, 7)]
    write(folder, 3, 7)
    assert folder.missing() == []
    folder.join()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "samples.npz",
        "settings.json",
    ]
    with np.load(folder.samples, allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
    rows = list(folder.images())
    np.testing.assert_array_equal(np.stack([image for image, _ in rows]), IMAGES)
    assert [label for _, label in rows] == LABELS.tolist()
    again = opened(tmp_path / "out")
    assert again.missing() == []
    again.join()


def test_the_joined_file_does_not_depend_on_the_shards(tmp_path):
    for name, edges in (("a", (0, 4, 10)), ("b", (0, 9, 10))):
        folder = opened(tmp_path / name)
        for start, stop in zip(edges, edges[1:], strict=False):
            write(folder, start, stop)
        folder.join()
    first, second = ((tmp_path / name / "samples.npz").read_bytes() for name in "ab")
    assert first == second


def test_leftovers_of_killed_writes_are_removed(tmp_path):
    write(opened(tmp_path), 0, 10)
    for leftover in (tmp_path / ".samples.npz.x1", tmp_path / "shards" / ".00000000.npz.x2"):
        leftover.write_bytes(b"half")
    folder = opened(tmp_path)
    assert not any(tmp_path.rglob(".*"))
    folder.join()
    folder._shards.mkdir()  # as if killed before the shards were deleted
    write(folder, 0, 4)
    assert opened(tmp_path).missing() == [] and not folder._shards.exists()


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, monkeypatch):
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
    assert not any(tmp_path.rglob(".*"))
    assert opened(tmp_path).missing() == [(5, 10)]


def test_a_damaged_shard_is_found_deleted_and_drawn_again(tmp_path):
    folder = opened(tmp_path)
    write(folder, 0, 5)
    write(folder, 5, 10)
    shard = tmp_path / "shards" / "00000005-00000010.npz"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(SamplingError, match="00000010.npz was damaged .* draws its images again"):
        folder.join()
    assert not folder.samples.exists()
    assert opened(tmp_path).missing() == [(5, 10)]


def test_folders_of_other_runs_are_refused(tmp_path):
    write(opened(tmp_path / "out"), 0, 10)
    with pytest.raises(SamplingError, match=r"another run's images \(seed: 0 -> 1\)"):
        opened(tmp_path / "out", record=RECORD | {"seed": 1})
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(SamplingError, match="holds images and no settings.json"):
        opened(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SamplingError, match="file cannot be made a folder"):
        opened(tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("mine")
    assert opened(tmp_path / "notes").missing() == [(0, 10)]
