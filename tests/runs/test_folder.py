"""A folder that a stopped run goes on in: its lock, its record, its parts, and what goes wrong."""

import contextlib
import json
import os
import random
import socket
import threading

import numpy as np
import pytest

from flowdcn_jax.errors import UserError
from flowdcn_jax.runs.folder import (
    DamagedError,
    ResumableFolder,
    differences,
    lock,
    read_array,
    read_npz,
)
from tests import faults

RECORD = {"seed": 0, "size": (4, 6), "settings": {"guidance": 1.375, "sampler": "euler"}}
SUMS = {"count": np.array(3), "sums": np.random.default_rng(0).standard_normal((2, 3))}


class FolderError(UserError, ValueError):
    """The kind that these folders raise; a ValueError, such as damage leads to."""


@pytest.fixture
def opened():
    """Opens a folder, as a new process would: the one before is closed."""
    with contextlib.ExitStack() as stack:

        def open_folder(path, record=RECORD, *, alone=True, ignore=(), **options):
            stack.close()
            fields = dict(files=("parts/*.npz", "sums.npz"), content="statistics", flag="--out")
            folder = ResumableFolder(path, **fields | options, error=FolderError)
            stack.enter_context(contextlib.closing(folder))
            folder.open(record, alone=alone, ignore=ignore)
            return folder

        yield open_folder


def read(folder, name):
    with folder.open_part(name) as archive:
        return {array: read_array(archive, array) for array in SUMS}


def check_sums(name, archive):
    if read_array(archive, "sums").shape != (2, 3):
        raise DamagedError("other sums")


def names(path):
    return sorted(path.name for path in path.iterdir())


def test_parts_are_there_when_the_folder_is_opened_again(tmp_path, opened):
    opened(tmp_path / "out").write_part("parts/0.npz", SUMS)
    folder = opened(tmp_path / "out")
    folder.check_parts(["parts/0.npz"], check_sums)
    found = read(folder, "parts/0.npz")
    assert all(array.dtype == SUMS[name].dtype for name, array in found.items())
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in SUMS.items()
    }
    assert names(tmp_path / "out") == [".lock", "parts", "settings.json"]
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == RECORD | {"size": [4, 6]}


def test_what_another_process_is_writing_is_refused_and_a_kill_frees_it(tmp_path, opened):
    with faults.held_by_another_process(tmp_path):
        with pytest.raises(FolderError, match=r"is in use by another run \(process 7 on elsewhere"):
            opened(tmp_path)
    opened(tmp_path)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert (tmp_path / ".lock").read_text() == f"{holder}\n"
    with pytest.raises(FolderError, match=rf"\({holder}\); expected one at a time: wait for it"):
        lock(tmp_path, error=FolderError)
    opened(tmp_path / "other")  # closes the first one
    lock(tmp_path, error=FolderError).close()


def test_a_lock_is_waited_for(tmp_path):
    with faults.held_by_another_process(tmp_path) as process:
        timer = threading.Timer(0.2, process.kill)
        timer.start()
        with lock(tmp_path, error=FolderError, wait=True):
            assert not timer.is_alive() and process.wait() != 0
            with pytest.raises(FolderError, match=f"process {os.getpid()} on"):
                lock(tmp_path, error=FolderError)


def test_a_file_system_without_locks_is_warned_of(tmp_path, opened, monkeypatch, caplog):
    faults.without_locks(monkeypatch)
    lock(tmp_path, error=FolderError, wait=True).close()  # by callers that can do without
    assert not caplog.text
    opened(tmp_path).write_part("sums.npz", SUMS)
    assert "cannot be locked: start no second run there" in caplog.text
    assert "No locks available" in caplog.text


def test_several_processes_may_write_parts_of_their_own(tmp_path, opened):
    with contextlib.closing(opened(tmp_path, alone=False)) as folder:
        (tmp_path / ".sums.npz.x1").write_bytes(b"the other's, half written")
        assert names(tmp_path) == [".sums.npz.x1", "settings.json"]
        opened(tmp_path, alone=False).write_part("parts/0.npz", SUMS)
        folder.write_part("parts/1.npz", SUMS)
    assert names(tmp_path) == [".sums.npz.x1", "parts", "settings.json"]


def test_leftovers_of_killed_writes_are_removed(tmp_path, opened):
    opened(tmp_path).write_part("parts/0.npz", SUMS)
    for leftover in (".settings.json.x1", ".sums.npz.x2", "parts/.1.npz.x3"):
        (tmp_path / leftover).write_bytes(b"half")
    (tmp_path / ".mine.npz.swp").write_bytes(b"someone's")
    opened(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob(".*")) == [".lock", ".mine.npz.swp"]


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, opened):
    with faults.full_disk(0):
        with pytest.raises(FolderError, match="cannot be .* written: .*File too large"):
            opened(tmp_path / "new")
    assert names(tmp_path / "new") == [".lock"]
    folder = opened(tmp_path / "out")
    folder.write_part("parts/0.npz", SUMS)
    with faults.full_disk(100):
        with pytest.raises(FolderError, match="File too large.*the same command goes on with the"):
            folder.write_part("parts/1.npz", SUMS)
    assert names(tmp_path / "out" / "parts") == ["0.npz"]


def test_another_record_is_refused(tmp_path, opened):
    opened(tmp_path)
    other = {"guidance": 2.0, "sampler": "euler"}
    with pytest.raises(FolderError) as caught:
        opened(tmp_path, RECORD | {"seed": 1, "settings": other, "guide": {"a": 1}})
    assert str(caught.value) == (
        f"{tmp_path} holds another run's statistics (seed: 0 -> 1; settings.guidance: 1.375 -> "
        "2.0; guide: None -> {...}); use the same settings, or another --out"
    )
    folder = opened(tmp_path, RECORD | {"seed": 1}, ignore={"seed"})
    assert folder.read_record() == RECORD | {"size": [4, 6]}


def test_records_of_older_versions_are_read_in_todays_words(tmp_path, opened):
    opened(tmp_path, {"autoencoder": "none"})

    def read_old(record):
        return {name: "preview" if value == "none" else value for name, value in record.items()}

    opened(tmp_path, {"autoencoder": "preview"}, read_old=read_old)
    with pytest.raises(FolderError, match="autoencoder: 'preview' -> 'identity'"):
        opened(tmp_path, {"autoencoder": "identity"}, read_old=read_old)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"seed": ', b"\xff"])
def test_a_damaged_record_is_named(tmp_path, opened, content):
    opened(tmp_path).write_part("parts/0.npz", SUMS)
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(FolderError, match="settings.json is damaged .* use another --out, or remo"):
        opened(tmp_path)
    assert names(tmp_path / "parts") == ["0.npz"]


def test_content_without_a_record_is_refused(tmp_path, opened):
    (tmp_path / "notes.txt").write_text("mine")
    opened(tmp_path / "new")
    opened(tmp_path).write_part("parts/0.npz", SUMS)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(FolderError, match=r"holds parts and no settings.json; .* folder \(--out"):
        opened(tmp_path)
    with pytest.raises(FolderError, match=r"holds (0.npz, ){3}\.\.\. and no settings"):
        opened(tmp_path / "parts", files=("0.npz",) * 4)
    with pytest.raises(FolderError, match="notes.txt cannot be made a folder"):
        opened(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "found, expected, options, texts",
    [
        ({"a": 1, "b": None}, {"a": 1}, {}, []),
        ({"a": [1, 2]}, {"a": [1, 3]}, {}, ["a: [1, 2] -> [1, 3]"]),
        ({"a": {"b": 1, "c": "x"}}, {"a": {"c": "y"}}, {}, ["a.c: 'x' -> 'y'", "a.b: 1 -> None"]),
        ({"a": {"b": 1}}, {"a": None}, {"key": "config"}, ["config.a: {...} -> None"]),
        ({"a": {"b": 1, "c": 1}}, {"a": {"b": 2, "c": 2}}, {"ignore": {"a.b"}}, ["a.c: 1 -> 2"]),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, {"key": "config", "ignore": {"config.a"}}, []),
        (1, 2, {"key": "seed"}, ["seed: 1 -> 2"]),
    ],
)
def test_differences_are_named(found, expected, options, texts):
    assert differences(found, expected, **options) == texts


def test_no_flipped_bit_gives_a_traceback_or_other_sums(tmp_path, opened, caplog):
    """Of every byte, some bit, each in a part of its own: found by a check, or when it is read."""
    folder, bits = opened(tmp_path), random.Random(0)
    folder.write_part("sums.npz", SUMS)
    whole = (tmp_path / "sums.npz").read_bytes()
    (tmp_path / "parts").mkdir()
    parts = {kind: [f"parts/{kind}{i}.npz" for i in range(len(whole))] for kind in "ab"}
    for name, index in zip(parts["a"] + parts["b"], [*range(len(whole))] * 2, strict=True):
        (tmp_path / name).write_bytes(faults.flipped(whole, index, bits.randrange(8)))
    folder.check_parts(parts["a"], check_sums)
    for name in [name for name in parts["a"] if (tmp_path / name).exists()] + parts["b"]:
        with contextlib.suppress(FolderError):
            found = read(folder, name)
            assert all((found[array] == SUMS[array]).all() for array in SUMS)
    for kind in parts.values():
        left = sum((tmp_path / name).exists() for name in kind)
        assert 0 < left < 0.4 * len(whole)  # some bytes mean nothing, as dates
    assert "cannot be used (wrong checksum of " in caplog.text


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_part_is_deleted_and_named(tmp_path, opened, caplog, keep):
    folder = opened(tmp_path)
    folder.write_part("sums.npz", SUMS)
    os.truncate(tmp_path / "sums.npz", int(keep * (tmp_path / "sums.npz").stat().st_size))
    with pytest.raises(
        FolderError, match="sums.npz cannot be used .*: it is deleted, and the comm"
    ):
        read(folder, "sums.npz")
    assert names(tmp_path) == [".lock", "settings.json"] and not caplog.text


def test_parts_of_another_form_are_deleted_and_those_of_a_failing_disk_are_not(
    tmp_path, opened, caplog
):
    folder = opened(tmp_path)
    folder.write_part("parts/0.npz", {"sums": np.zeros((9, 9))})
    folder.write_part("parts/1.npz", {"means": np.zeros((2, 3))})
    folder.write_part("parts/2.npz", SUMS)
    folder.check_parts([f"parts/{number}.npz" for number in range(3)], check_sums)
    assert "0.npz cannot be used (other sums)" in caplog.text
    assert "1.npz cannot be used (KeyError: " in caplog.text
    assert names(tmp_path / "parts") == ["2.npz"]
    (tmp_path / "sums.npz").mkdir()  # stands for what cannot be read now
    for use in (lambda: read(folder, "sums.npz"), lambda: folder.check_parts(["sums.npz"], None)):
        with pytest.raises(FolderError, match="cannot be read or written: .*Is a directory"):
            use()
    assert (tmp_path / "sums.npz").exists()


def test_an_error_of_the_reader_is_no_damage(tmp_path, opened):
    folder = opened(tmp_path)
    folder.write_part("sums.npz", SUMS)
    with pytest.raises(FolderError, match="^too many$"), folder.open_part("sums.npz"):
        raise FolderError("too many")
    assert (tmp_path / "sums.npz").exists()


def test_an_array_longer_than_its_header_says_is_damaged(tmp_path):
    """As when a bit of the header, whose checksum is compared at the array's end, has flipped."""
    np.savez(tmp_path / "sums.npz", sums=np.zeros(1000))
    content = (tmp_path / "sums.npz").read_bytes()
    (tmp_path / "sums.npz").write_bytes(content.replace(b"(1000,)", b"(1,)   "))
    with pytest.raises(DamagedError), read_npz(tmp_path / "sums.npz") as archive:
        read_array(archive, "sums")


def test_large_parts_are_checked_to_their_last_byte(tmp_path, opened, caplog):
    """Also what zipfile does not read together with the header."""
    folder = opened(tmp_path)
    folder.write_part("sums.npz", {"sums": np.zeros((2, 3)), "more": np.zeros(99_999)})
    content = (tmp_path / "sums.npz").read_bytes()
    (tmp_path / "sums.npz").write_bytes(faults.flipped(content, len(content) - 2000))
    folder.check_parts(["sums.npz"], check_sums)
    assert "wrong checksum of more.npy" in caplog.text
