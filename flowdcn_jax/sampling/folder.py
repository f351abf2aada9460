"""A folder that belongs to one run or one comparison: a record, pictures, and a run's images.

    settings.json, .lock      see `runs.folder`
    grid.png                  a run's first images
    images/00000.png ...      each image of a run
    compare_KIND.png          a comparison
    shards/START-STOP.npz     a run's images START ... STOP - 1, until all are there
    samples.npz               all of them; the shards are then deleted

Every file is whole or not there. After a kill, a full disk or damage the next call finds what is
missing.
"""

import contextlib
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from flowdcn_jax.config import modernise
from flowdcn_jax.files import atomic_write
from flowdcn_jax.images import save_png
from flowdcn_jax.runs.contents import IMAGES, check_is_for
from flowdcn_jax.runs.folder import DamagedError, ResumableFolder, read_array, read_npz
from flowdcn_jax.sampling.settings import SamplingError

GRID_FILE = "grid.png"
IMAGES_FOLDER = "images"
SAMPLES_FILE = "samples.npz"
SHARDS_FOLDER = "shards"
FILES = (
    SAMPLES_FILE,
    f"{SHARDS_FOLDER}/*.npz",
    GRID_FILE,
    f"{IMAGES_FOLDER}/*.png",
    "compare_*.png",
)
_START = "start"  # of a shard: the number of its first image
SHARD_NAME = re.compile(r"(\d{8,})-(\d{8,})\.npz")
COPIED_BYTES = 2**24  # read at a time
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # none of today's, so that the same images give the same bytes


class OutputFolder(ResumableFolder):
    """The folder of one record, with pictures; one process opens it, writes, and closes it."""

    def __init__(self, path: Path):
        """See ResumableFolder, whose errors are SamplingErrors here."""
        super().__init__(
            path,
            files=FILES,
            content="images",
            flag="--out",
            error=SamplingError,
            read_old=modernise,
        )
        self.grid = path / GRID_FILE

    def open(self, record: dict, **options: Any) -> dict:
        """As ResumableFolder.open.

        Raises:
            SamplingError: also if the folder is a run's or a data set's.
        """
        check_is_for(self.path, IMAGES, flag="--out", error=SamplingError)
        return super().open(record, **options)

    def save_png(self, name: str, image: np.ndarray, metadata: dict) -> None:
        """Writes a picture, whole or not at all; see `images.save_png`.

        Raises:
            SamplingError: the disk is full, or the folder cannot be written to.
        """
        with self.reporting():
            save_png(self.path / name, image, metadata)


class SampleFolder(OutputFolder):
    """The folder of one sampling run of `num_images` images."""

    def __init__(self, path: Path, num_images: int, rows: Mapping[str, jax.ShapeDtypeStruct]):
        """`rows`: what the files hold of each image, by name; its pixels, then its label."""
        super().__init__(path)
        self.num_images = num_images
        self.rows = rows
        self.samples = path / SAMPLES_FILE

    def open(self, record: dict) -> None:
        """As ResumableFolder.open; then reads all shards, and deletes those that cannot be used.

        Raises:
            SamplingError: see ResumableFolder.open; or samples.npz is damaged.
        """
        super().open(record)
        with self.reporting():
            if self.samples.exists():
                with self._reading_samples() as archive:  # a little: images are compared when read
                    self._check_arrays(archive, self.num_images)
                self._delete_shards()
            else:
                self._check_shards()

    def missing(self) -> list[tuple[int, int]]:
        """[(start, stop)] of the images that are not there yet."""
        if self.samples.exists():
            return []
        gaps, position = [], 0
        for start, stop, _ in [*self._shards(), (self.num_images, self.num_images, "")]:
            if start > position:
                gaps.append((position, start))
            position = max(position, stop)
        return gaps

    def write(self, start: int, *arrays: np.ndarray) -> None:
        """Writes images start, start + 1, ... as a shard: their pixels, and their labels.

        Raises:
            SamplingError: the disk is full, or the folder cannot be written to.
        """
        name = f"{SHARDS_FOLDER}/{start:08d}-{start + len(arrays[0]):08d}.npz"
        rows = dict(zip(self.rows, arrays, strict=True))
        self.write_part(name, rows | {_START: np.asarray(start)})

    def join(self) -> None:
        """Makes samples.npz of the shards, which hold all images, and deletes them.

        Raises:
            SamplingError: the disk is full; the shards do not hold every image once; or one turns
                out to be damaged, and is deleted.
        """
        if self.samples.exists():
            return
        shards = self._shards()
        edges = [0, *(edge for start, stop, _ in shards for edge in (start, stop)), self.num_images]
        if edges[::2] != edges[1::2]:
            raise SamplingError(
                f"{self.path / SHARDS_FOLDER} does not hold each of {self.num_images} images once; "
                "the same command goes on"
            )
        with self.reporting(), atomic_write(self.samples) as file:
            with zipfile.ZipFile(file, "w", allowZip64=True) as joined:
                for name, row in self.rows.items():
                    entry = zipfile.ZipInfo(f"{name}.npy", ZIP_DATE)
                    with joined.open(entry, "w", force_zip64=True) as target:
                        _write_header(target, (self.num_images, *row.shape), row.dtype)
                        for start, stop, shard in shards:
                            with (
                                self.open_part(shard) as archive,
                                self._array(archive, name, stop - start) as source,
                            ):
                                shutil.copyfileobj(source, target, COPIED_BYTES)
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

    def _shards(self) -> list[tuple[int, int, str]]:
        """(start, stop, name) of the shards, in order; files of other names are not ours."""
        found = []
        for path in (self.path / SHARDS_FOLDER).glob("*.npz"):
            if match := SHARD_NAME.fullmatch(path.name):
                found.append((int(match[1]), int(match[2]), f"{SHARDS_FOLDER}/{path.name}"))
        return sorted(found)

    def _check_shards(self) -> None:
        """Deletes shards that are damaged, overlap the one before or are not as they are named."""
        ranges = {name: (start, stop) for start, stop, name in self._shards()}
        position = 0

        def check(name: str, archive: zipfile.ZipFile) -> None:
            nonlocal position
            start, stop = ranges[name]
            if not position <= start < stop <= self.num_images:
                raise DamagedError(f"there are images 0 to {position} of {self.num_images}")
            self._check_arrays(archive, stop - start)
            if f"{_START}.npy" in archive.namelist():  # shards of older versions do not say it
                if (found := int(read_array(archive, _START))) != start:
                    raise DamagedError(f"it holds the images from {found} on")
            position = stop

        self.check_parts(list(ranges), check)

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

    @contextlib.contextmanager
    def _reading_samples(self) -> Iterator[zipfile.ZipFile]:
        try:
            with read_npz(self.samples) as archive:
                yield archive
        except DamagedError as error:
            raise SamplingError(
                f"{self.samples} is damaged ({error}); put an undamaged copy in its place, "
                "or remove it, and the same command draws its images again"
            ) from error

    def _delete_shards(self) -> None:
        for _, _, name in self._shards():
            (self.path / name).unlink()
        with contextlib.suppress(OSError):  # not there, or something else lies in it
            (self.path / SHARDS_FOLDER).rmdir()


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    description = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": description, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
