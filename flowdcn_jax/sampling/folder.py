"""A run's images: written in shards as they come, joined at the end, repaired when reopened.

    shards/START-STOP.npz     images START ... STOP - 1, until all are there
    samples.npz               all of them; the shards are then deleted

beside the files of `output_folder`. After a kill, a full disk or damage the next call finds what is
missing.
"""

import contextlib
import errno
import logging
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np
from tqdm import tqdm

from flowdcn_jax.files import atomic_write
from flowdcn_jax.sampling.output_folder import SAMPLES_FILE, SHARDS_FOLDER, OutputFolder
from flowdcn_jax.sampling.settings import SamplingError

SHARD_NAME = re.compile(r"(\d{8,})-(\d{8,})\.npz")
COPIED_BYTES = 2**24  # read at a time
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # none of today's, so that the same images give the same bytes


class DamagedError(Exception):
    """A file that is not what was written; the message says in which respect."""


class SampleFolder(OutputFolder):
    """The folder of one sampling run of `num_images` images; one process writes."""

    def __init__(self, path: Path, num_images: int, rows: Mapping[str, jax.ShapeDtypeStruct]):
        """`rows`: what the files hold of each image, by name; its pixels, then its label."""
        super().__init__(path)
        self.num_images = num_images
        self.rows = rows
        self.samples = path / SAMPLES_FILE
        self._shards = path / SHARDS_FOLDER

    def open(self, record: dict) -> None:
        """As OutputFolder.open; then reads all shards, and deletes those that cannot be used.

        Raises:
            SamplingError: see OutputFolder.open; or samples.npz is damaged.
        """
        super().open(record)
        with self.reporting():
            if self.samples.exists():
                self._check_samples()
                self._delete_shards()
            else:
                self._delete_unusable_shards()

    def missing(self) -> list[tuple[int, int]]:
        """[(start, stop)] of the images that are not there yet."""
        if self.samples.exists():
            return []
        gaps, position = [], 0
        for start, stop, _ in [*self._found(), (self.num_images, self.num_images, None)]:
            if start > position:
                gaps.append((position, start))
            position = max(position, stop)
        return gaps

    def write(self, start: int, *arrays: np.ndarray) -> None:
        """Writes images start, start + 1, ... as a shard: their pixels, and their labels.

        Raises:
            SamplingError: the disk is full, or the folder cannot be written to.
        """
        stop = start + len(arrays[0])
        path = self._shards / f"{start:08d}-{stop:08d}.npz"
        with self.reporting(), atomic_write(path) as file:
            np.savez(file, **dict(zip(self.rows, arrays, strict=True)))

    def join(self) -> None:
        """Makes samples.npz of the shards, which hold all images, and deletes them.

        Raises:
            SamplingError: the disk is full; the shards do not hold every image once; or one turns
                out to be damaged, and is deleted.
        """
        if self.samples.exists():
            return
        shards = self._found()
        edges = [0, *(edge for start, stop, _ in shards for edge in (start, stop)), self.num_images]
        if edges[::2] != edges[1::2]:
            raise SamplingError(
                f"{self._shards} does not hold each of {self.num_images} images once; the same "
                "command goes on"
            )
        with self.reporting(), atomic_write(self.samples) as file:
            with zipfile.ZipFile(file, "w", allowZip64=True) as joined:
                for name, row in self.rows.items():
                    entry = zipfile.ZipInfo(f"{name}.npy", ZIP_DATE)
                    with joined.open(entry, "w", force_zip64=True) as target:
                        _write_header(target, (self.num_images, *row.shape), row.dtype)
                        for start, stop, path in shards:
                            self._copy(path, name, stop - start, target)
        with self.reporting():
            self._delete_shards()

    def images(self) -> Iterator[tuple[np.ndarray, int]]:
        """(image, label) of samples.npz one after the other, without reading all of it at once.

        Raises:
            SamplingError: samples.npz is damaged.
        """
        (name, row), (labels_name, _) = self.rows.items()
        size = int(np.prod(row.shape)) * row.dtype.itemsize
        with self.reporting(), self._reading_samples() as archive:
            with self._array(archive, labels_name, self.num_images) as file:
                labels = np.frombuffer(file.read(), self.rows[labels_name].dtype)
            with self._array(archive, name, self.num_images) as file:
                for label in labels:
                    yield np.frombuffer(file.read(size), row.dtype).reshape(row.shape), int(label)

    def _found(self) -> list[tuple[int, int, Path]]:
        """(start, stop, path) of the shards, in order; files of other names are not ours."""
        found = []
        for path in self._shards.glob("*.npz"):
            if match := SHARD_NAME.fullmatch(path.name):
                found.append((int(match[1]), int(match[2]), path))
        return sorted(found)

    def _delete_unusable_shards(self) -> None:
        """Deletes shards that are damaged, overlap the one before or are not what they are named.

        All bytes are read: a shard that failed only when joined would cost another call.
        """
        position = 0
        options = dict(desc="checking", unit="shard", delay=2, leave=False, dynamic_ncols=True)
        for start, stop, path in tqdm(self._found(), **options):
            try:
                if not position <= start < stop <= self.num_images:
                    raise DamagedError(f"there are images 0 to {position} of {self.num_images}")
                with _reading(path) as archive:
                    if member := archive.testzip():
                        raise DamagedError(f"wrong checksum of {member}")
                    self._check_arrays(archive, stop - start)
                position = stop
            except DamagedError as error:
                logging.warning(
                    "%s cannot be used (%s): it is deleted, and its images are drawn again",
                    path,
                    error,
                )
                path.unlink()

    def _check_samples(self) -> None:
        """Reads little of it: checksums are compared when the images are read."""
        with self._reading_samples() as archive:
            self._check_arrays(archive, self.num_images)

    def _check_arrays(self, archive: zipfile.ZipFile, count: int) -> None:
        for name in self.rows:
            with self._array(archive, name, count):
                pass

    @contextlib.contextmanager
    def _array(self, archive: zipfile.ZipFile, name: str, count: int) -> Iterator[BinaryIO]:
        """The array `name` of `count` images, behind its header, which is checked."""
        expected = ((count, *self.rows[name].shape), False, self.rows[name].dtype)
        with archive.open(f"{name}.npy") as file:
            np.lib.format.read_magic(file)
            found = np.lib.format.read_array_header_1_0(file)
            if found != expected:
                raise DamagedError(f"{name} is {found}; expected {expected}")
            yield file

    def _copy(self, path: Path, name: str, count: int, target: BinaryIO) -> None:
        """Appends a shard's array; the zip file's checksum is compared on the way."""
        try:
            with _reading(path) as archive, self._array(archive, name, count) as source:
                shutil.copyfileobj(source, target, COPIED_BYTES)
        except DamagedError as error:
            path.unlink()
            raise SamplingError(
                f"{path} was damaged ({error}) and is deleted; the same command draws its "
                "images again"
            ) from error

    @contextlib.contextmanager
    def _reading_samples(self) -> Iterator[zipfile.ZipFile]:
        try:
            with _reading(self.samples) as archive:
                yield archive
        except DamagedError as error:
            raise SamplingError(
                f"{self.samples} is damaged ({error}); put an undamaged copy in its place, "
                "or remove it, and the same command draws its images again"
            ) from error

    def _delete_shards(self) -> None:
        for _, _, path in self._found():
            path.unlink()
        with contextlib.suppress(OSError):  # not there, or something else lies in it
            self._shards.rmdir()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz file; DamagedError for whatever zipfile and NumPy raise when it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (
        zipfile.BadZipFile,
        EOFError,
        KeyError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        struct.error,
        zlib.error,
    ) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning
            raise
        raise DamagedError(f"{type(error).__name__}: {error}") from error


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    description = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": description, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
