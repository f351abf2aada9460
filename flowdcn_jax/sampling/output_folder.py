"""A folder that belongs to one run or one comparison: its record, its lock, its pictures.

    settings.json                what the pictures depend on; a folder with another's is refused
    .lock                        held by the process that writes
    grid.png, compare_KIND.png   what people look at
    images/00000.png ...         each image of a run

Every file is whole or not there.
"""

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowdcn_jax.files import atomic_write
from flowdcn_jax.images import save_png
from flowdcn_jax.sampling.settings import SamplingError

SETTINGS_FILE = "settings.json"
LOCK_FILE = ".lock"
GRID_FILE = "grid.png"
IMAGES_FOLDER = "images"
SAMPLES_FILE = "samples.npz"
SHARDS_FOLDER = "shards"

RESULTS = (SAMPLES_FILE, SHARDS_FOLDER, GRID_FILE, IMAGES_FOLDER, "compare_*.png")
LEFTOVERS = (  # of writes that were killed: see files.atomic_write
    f".{SETTINGS_FILE}.*",
    f".{SAMPLES_FILE}.*",
    f"{SHARDS_FOLDER}/.*.npz.*",
    f".{GRID_FILE}.*",
    f"{IMAGES_FOLDER}/.*.png.*",
    ".compare_*.png.*",
)


class OutputFolder:
    """The folder of one record; one process opens it, writes, and closes it."""

    def __init__(self, path: Path):
        self.path = path
        self.grid = path / GRID_FILE
        self._lock = None

    def open(self, record: dict) -> None:
        """Makes the folder, or checks that it is this record's, and locks it until `close`.

        What killed writes left over is removed. Call `close` even if this fails.

        Args:
            record: what the pictures depend on, as JSON takes it.

        Raises:
            SamplingError: the folder cannot be made, holds another record's pictures or a damaged
                record, or another process is writing to it.
        """
        record = json.loads(json.dumps(record))  # tuples become lists, as in the file
        settings = self.path / SETTINGS_FILE
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SamplingError(f"--out={self.path} cannot be made a folder: {error}") from error
        with self.reporting():
            if not settings.exists():
                self._refuse_results()
            self._take_lock()
            if settings.exists():
                self._check_same(_read_record(settings), record)
            else:
                with atomic_write(settings) as file:
                    file.write(json.dumps(record, indent=2).encode() + b"\n")
            for pattern in LEFTOVERS:
                for leftover in self.path.glob(pattern):
                    leftover.unlink()

    def close(self) -> None:
        """Lets other processes write; harmless where nothing is open."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save_png(self, name: str, image: np.ndarray, metadata: dict) -> None:
        """Writes a picture, whole or not at all; see `images.save_png`.

        Raises:
            SamplingError: the disk is full, or the folder cannot be written to.
        """
        with self.reporting():
            save_png(self.path / name, image, metadata)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Turns a full disk and its like into an error that says how to go on."""
        try:
            yield
        except OSError as error:
            raise SamplingError(
                f"{self.path} cannot be read or written: {error}. What is there stays; the same "
                "command goes on with the rest"
            ) from error

    def _refuse_results(self) -> None:
        found = [path.name for pattern in RESULTS for path in sorted(self.path.glob(pattern))]
        if found:
            raise SamplingError(
                f"{self.path} holds {', '.join(found)} and no {SETTINGS_FILE}; expected a new or "
                "empty folder (--out)"
            )

    def _take_lock(self) -> None:
        """The system lets go of it when the process ends, however it does."""
        lock = (self.path / LOCK_FILE).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise SamplingError(
                f"{self.path} is being written by another process; wait until it has ended, or "
                "use another --out"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logging.warning(
                "%s cannot be locked (%s): start no second command that writes to it",
                self.path,
                error,
            )
        self._lock = lock

    def _check_same(self, found: dict, expected: dict) -> None:
        differences = list(_differences(found, expected))
        if differences:
            raise SamplingError(
                f"{self.path} holds another run's images ({'; '.join(differences)}); use the same "
                "settings, or another --out"
            )


def _read_record(path: Path) -> dict:
    remedy = "use another --out, or remove the folder to draw everything again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise SamplingError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(record, dict):
        raise SamplingError(f"{path} is damaged (it holds no settings); {remedy}")
    return record


def _differences(found: Any, expected: Any, key: str = "") -> Iterator[str]:
    """For each value in which two nested dicts differ: "settings.guidance: 1.375 -> 2.0"."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in [*expected, *(name for name in found if name not in expected)]:
            inner = f"{key}.{name}" if key else name
            yield from _differences(found.get(name), expected.get(name), inner)
    elif found != expected:
        shown = ("{...}" if isinstance(value, dict) else repr(value) for value in (found, expected))
        yield f"{key}: {' -> '.join(shown)}"
