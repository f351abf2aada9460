"""A folder that one run fills, and goes on filling after it was stopped.

    settings.json   the record: what the content depends on; the folder is for no other
    .lock           held by the process that writes, and says which that is
    *.npz           parts of the content: each is there as a whole or not at all

Damage is named. Damaged parts are deleted as well, so that the run makes them again.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from flowdcn_jax.errors import UserError
from flowdcn_jax.faults import DamagedError, is_damage, retried
from flowdcn_jax.files import atomic_write

RECORD_FILE = "settings.json"
LOCK_FILE = ".lock"


class ResumableFolder:
    """The folder of one record; a run opens it, writes what is missing, and closes it.

    Every method raises the `error` that it was made with, also for a full disk and its like.

    Attributes:
        path: where it is.
    """

    def __init__(
        self,
        path: Path,
        *,
        files: Sequence[str],
        content: str,
        flag: str,
        error: type[UserError],
        read_old: Callable[[dict], dict] = lambda record: record,
    ):
        """Nothing is read or made before `open`.

        Args:
            path: the folder; need not be there.
            files: what runs write into it, as patterns: "shards/*.npz".
            content: what that is, as messages say it: "images".
            flag: the option that names the folder: "--out".
            error: what is raised.
            read_old: gives the record that a run of today would have written, from that of an
                older version.
        """
        self.path = path
        self._files = files
        self._content = content
        self._flag = flag
        self._error = error
        self._read_old = read_old
        self._lock: TextIO | None = None

    def open(self, record: dict, *, alone: bool = True, ignore: Collection[str] = ()) -> dict:
        """Makes the folder, or finds it to be this record's. Call `close` even if this fails.

        Args:
            record: what the content depends on, as JSON takes it.
            alone: keep other processes out until `close`, and remove what killed writes have left.
                False where several write, each parts of its own.
            ignore: what may differ from the record that is there; see `differences`.

        Returns:
            The record that the folder has, lists for tuples.

        Raises:
            error: the folder cannot be made, is in use, holds another record's content, content
                without a record, or a damaged record.
        """
        record = json.loads(json.dumps(record))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise self._error(
                f"{self.path} cannot be made a folder: {problem}; use another {self._flag}"
            ) from problem
        with self.reporting():
            found = self.read_record()
            if found is None:
                self._refuse_content()
            if alone:
                self._lock = lock(self.path, error=self._error)
                found = self.read_record()  # perhaps of the process that had the lock
            if found is None:
                with atomic_write(self.path / RECORD_FILE) as file:
                    file.write(json.dumps(record, indent=2).encode() + b"\n")
                found = self.read_record()  # perhaps of another process that begins too
            if different := differences(found, record, ignore=ignore):
                raise self._error(
                    f"{self.path} holds another run's {self._content} ({'; '.join(different)}); "
                    f"use the same settings, or another {self._flag}"
                )
            if alone:
                self._remove_leftovers()
        return found

    def close(self) -> None:
        """Lets other processes write; harmless where nothing is open."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read_record(self) -> dict | None:
        """The record in today's form; None if there is none.

        Raises:
            error: it is damaged, or cannot be read.
        """
        path = self.path / RECORD_FILE
        with self.reporting():
            try:
                record = json.loads(retried(lambda: path.read_text(encoding="utf-8")))
                if not isinstance(record, dict):
                    raise ValueError("it holds no settings")
            except FileNotFoundError:
                return None
            except ValueError as problem:  # no JSON, or no UTF-8
                raise self._error(
                    f"{path} is damaged ({problem}); use another {self._flag}, or remove "
                    f"{self.path} to make all {self._content} again"
                ) from problem
        return self._read_old(record)

    def write_part(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes arrays as the file `name`, whole or not at all."""
        with self.reporting(), atomic_write(self.path / name) as file:
            np.savez(file, **arrays)

    @contextlib.contextmanager
    def open_part(self, name: str) -> Iterator[zipfile.ZipFile]:
        """The part `name`, for `read_array`; deletes it if it turns out to be damaged.

        Raises:
            error: it is damaged: the run has to go on without it, or to be started again.
        """
        with self.reporting():
            try:
                with read_npz(self.path / name) as archive:
                    yield archive
            except DamagedError as problem:
                raise self._error(self._delete_part(name, problem)) from problem

    def check_parts(
        self, names: Sequence[str], check: Callable[[str, zipfile.ZipFile], None]
    ) -> None:
        """Reads all bytes of parts and deletes those that are damaged, with a warning each.

        Damage that showed only when all parts are used would cost another start.

        Args:
            names: parts that are there.
            check: called with a part's name and content; raises DamagedError if it is of no use.
        """
        shown = tqdm(names, "checking", unit="part", delay=2, leave=False, dynamic_ncols=True)
        with self.reporting():
            for name in shown:
                try:
                    with read_npz(self.path / name) as archive:
                        if member := archive.testzip():
                            raise DamagedError(f"wrong checksum of {member}")
                        check(name, archive)
                except DamagedError as problem:
                    logging.warning(self._delete_part(name, problem))

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Turns a full disk and its like into an `error` that says how to go on."""
        try:
            yield
        except UserError:  # some are OSErrors too
            raise
        except OSError as problem:
            raise self._error(
                f"{self.path} cannot be read or written: {problem}. What is there stays; the same "
                "command goes on with the rest"
            ) from problem

    def _refuse_content(self) -> None:
        names = [pattern.partition("/")[0] for pattern in self._files]
        found = [path.name for name in names for path in sorted(self.path.glob(name))]
        if found:
            shown = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
            raise self._error(
                f"{self.path} holds {shown} and no {RECORD_FILE}; expected a new or empty folder "
                f"({self._flag})"
            )

    def _remove_leftovers(self) -> None:
        for pattern in (RECORD_FILE, *self._files):
            folder, _, name = pattern.rpartition("/")
            for leftover in (self.path / folder).glob(f".{name}.*"):  # as atomic_write names them
                leftover.unlink()

    def _delete_part(self, name: str, problem: DamagedError) -> str:
        """Returns what is to be said of it."""
        (self.path / name).unlink(missing_ok=True)
        return (
            f"{self.path / name} cannot be used ({problem}): it is deleted, and the command that "
            f"made its {self._content} makes them again"
        )


def lock(folder: Path, *, error: type[UserError], wait: bool = False) -> TextIO:
    """Keeps other processes out of `folder` until the file that this gives is closed.

    The system closes it when the process ends, however it does. Until then it names the process.

    Args:
        folder: must be there.
        error: raised if another process has the lock; the message says which.
        wait: wait for that process instead. Only for what goes well without a lock too: where the
            file system has none, nothing is said. Otherwise a warning is.

    Raises:
        OSError: the folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        # So opened, the line that another process has written stays as it is.
        file = stack.enter_context((folder / LOCK_FILE).open("a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "just starting"
            raise error(
                f"{folder} is in use by another run ({holder}); expected one at a time: wait for "
                "it, or name another folder"
            ) from None
        except OSError as problem:  # some network file systems have no locks
            if not wait:
                logging.warning(
                    "%s cannot be locked: start no second run there (%s)", file.name, problem
                )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        stack.pop_all()
        return file


def differences(
    found: Any, expected: Any, key: str = "", *, ignore: Collection[str] = ()
) -> list[str]:
    """Says of each value in which two nested dicts differ: "settings.guidance: 1.375 -> 2.0".

    What is not there is None.

    Args:
        found: a value of JSON, the first of each pair.
        expected: another, the second.
        key: begins the names of the values.
        ignore: names that may differ, and all that is below them.
    """
    if key in ignore:
        return []
    if isinstance(found, dict) and isinstance(expected, dict):
        texts = []
        for name in [*expected, *(name for name in found if name not in expected)]:
            inner = f"{key}.{name}" if key else name
            texts += differences(found.get(name), expected.get(name), inner, ignore=ignore)
        return texts
    if found == expected:
        return []
    shown = ("{...}" if isinstance(value, dict) else repr(value) for value in (found, expected))
    return [f"{key}: {' -> '.join(shown)}"]


@contextlib.contextmanager
def read_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz file, while the block reads it.

    Raises:
        DamagedError: opening it, or the block, met what a damaged file leads to.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (UserError, DamagedError):  # some are ValueErrors too
        raise
    except Exception as problem:
        if not is_damage(problem):
            raise
        raise DamagedError(f"{type(problem).__name__}: {problem}") from problem


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """The array `name` of an .npz file, for a block of `read_npz` or `open_part`."""
    with archive.open(f"{name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # only at its end is the checksum compared
            raise DamagedError(f"{name} is longer than its header says")
    return array
