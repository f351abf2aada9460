"""A folder of images: written in shards as they come, joined at the end, repaired when reopened.

    settings.json             what the images depend on; another run's folder is refused
    shards/START-STOP.npz     images START ... STOP - 1, until all are there
    samples.npz               all of them; the shards are then deleted

Every file is whole or not there. After a kill or a full disk the next call finds what is missing.
"""

import contextlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flowdcn_jax.files import atomic_write
from flowdcn_jax.sampling.settings import SamplingError

SETTINGS_FILE = "settings.json"
SHARDS_FOLDER = "shards"
SAMPLES_FILE = "samples.npz"
COPIED_BYTES = 2**24  # read at a time when shards are joined
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # none of today's, so that the same images give the same bytes


class SampleFolder:
    """The files of one sampling run of `num_images` images; one process writes."""

    def __init__(self, path: Path, num_images: int):
        self.path = path
        self.num_images = num_images
        self.samples = path / SAMPLES_FILE
        self._shards = path / SHARDS_FOLDER

    def open(self, record: dict) -> None:
        """Makes the folder, or checks that it is this run's, and removes what was half written.

        Args:
            record: what the images depend on, as JSON takes it.

        Raises:
            SamplingError: the folder cannot be made, or holds images of another run.
        """
        record = json.loads(json.dumps(record))
        settings = self.path / SETTINGS_FILE
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SamplingError(f"--out={self.path} cannot be made a folder: {error}") from error
        with self._reporting():
            if settings.exists():
                self._check_same(json.loads(settings.read_text(encoding="utf-8")), record)
            elif self.samples.exists() or self._shards.exists():
                raise SamplingError(
                    f"{self.path} holds images and no {SETTINGS_FILE}; expected a new or empty "
                    "folder (--out)"
                )
            else:
                with atomic_write(settings) as file:
                    file.write(json.dumps(record, indent=2).encode() + b"\n")
            self._clean_up()

    def missing(self) -> list[tuple[int, int]]:
        """[(start, stop)] of the images that are not there yet."""
        if self.samples.exists():
            return []
        gaps, position = [], 0
        for start, stop, _ in [*self._finished(), (self.num_images, self.num_images, None)]:
            if start > position:
                gaps.append((position, start))
            position = max(position, stop)
        return gaps

    def write(self, start: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes images start, start + 1, ... as a shard.

        Raises:
            SamplingError: the disk is full, or the folder cannot be written to.
        """
        stop = start + len(next(iter(arrays.values())))
        path = self._shards / f"{start:08d}-{stop:08d}.npz"
        with self._reporting(), atomic_write(path) as file:
            np.savez(file, **arrays)

    def join(self) -> None:
        """Makes samples.npz of the shards, which hold all images, and deletes them.

        Raises:
            SamplingError: the disk is full, or a shard turns out to be damaged: it is deleted.
        """
        if self.samples.exists():
            return
        shards = [path for _, _, path in self._finished()]
        with self._reporting(), atomic_write(self.samples) as file:
            with zipfile.ZipFile(file, "w", allowZip64=True) as joined:
                for name in zipfile.ZipFile(shards[0]).namelist():
                    entry = zipfile.ZipInfo(name, ZIP_DATE)
                    with joined.open(entry, "w", force_zip64=True) as target:
                        self._join_array(name, shards, target)
        self._clean_up()

    def images(self) -> Iterator[tuple[np.ndarray, int]]:
        """(image, label) of samples.npz one after the other, without reading all of it at once."""
        with zipfile.ZipFile(self.samples) as archive:
            rows_name, labels_name = archive.namelist()
            with archive.open(labels_name) as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
            with archive.open(rows_name) as file:
                shape, dtype = _read_header(file)
                size = int(np.prod(shape[1:])) * dtype.itemsize
                for label in labels:
                    yield np.frombuffer(file.read(size), dtype).reshape(shape[1:]), int(label)

    def _join_array(self, name: str, shards: list[Path], target) -> None:
        for number, path in enumerate(shards):
            try:
                with zipfile.ZipFile(path) as archive, archive.open(name) as source:
                    shape, dtype = _read_header(source)
                    if number == 0:
                        _write_header(target, (self.num_images, *shape[1:]), dtype)
                    shutil.copyfileobj(source, target, COPIED_BYTES)  # checks the zip's checksum
            except (zipfile.BadZipFile, EOFError, ValueError) as error:
                path.unlink()
                raise SamplingError(
                    f"{path} was damaged ({error}) and is deleted; the same command draws its "
                    "images again"
                ) from error

    def _check_same(self, found: dict, expected: dict) -> None:
        keys = sorted(found.keys() | expected.keys())
        differences = [
            f"{key}: {found.get(key)} -> {expected.get(key)}"
            for key in keys
            if found.get(key) != expected.get(key)
        ]
        if differences:
            raise SamplingError(
                f"{self.path} holds another run's images ({'; '.join(differences)}); use the same "
                "settings, or another --out"
            )

    def _finished(self) -> list[tuple[int, int, Path]]:
        """(start, stop, path) of the shards, in order."""
        found = []
        for path in sorted(self._shards.glob("*-*.npz")):
            start, stop = map(int, path.stem.split("-"))
            found.append((start, stop, path))
        return found

    def _clean_up(self) -> None:
        """Removes temporary files of writes that were killed, and shards that are joined."""
        for leftover in [*self.path.glob(".*.npz.*"), *self._shards.glob(".*.npz.*")]:
            leftover.unlink()
        if self.samples.exists():
            shutil.rmtree(self._shards, ignore_errors=True)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns a full disk and its like into an error that says how to go on."""
        try:
            yield
        except OSError as error:
            raise SamplingError(
                f"{self.path} cannot be written to: {error}. Images that are there stay; the same "
                "command goes on with the rest"
            ) from error


def _read_header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy stream, which is left at the first array byte."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _write_header(file, shape: tuple[int, ...], dtype: np.dtype) -> None:
    description = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": description, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
