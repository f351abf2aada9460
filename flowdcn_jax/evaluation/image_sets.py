"""Sets of uint8 RGB images of one size, read once from the first to the last.

They come from .npz files (`arr_0`, as ADM's evaluator and sample.py have it), from folders of image
files, and from data sets.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from flowdcn_jax.data import SOURCES, make_source
from flowdcn_jax.data.image_files import (
    BadImageError,
    centre_crop,
    decode_rgb,
    open_formats,
)
from flowdcn_jax.data.labelled_images import FOLDER_PREFIX, open_labelled_images
from flowdcn_jax.evaluation.settings import EvaluationError
from flowdcn_jax.faults import is_damage, retried
from flowdcn_jax.files import local_path

SAMPLES_FILE, SETTINGS_FILE = "samples.npz", "settings.json"  # in a folder of sample.py
IMAGES_KEY = "arr_0"

PIXEL_SIZES = {"cifar10": 32, "digits": 8}  # of data sets that hold pixels
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_RANGES_AHEAD = 2  # of image files, being decoded

Reader = Callable[[Iterable[range]], Generator[np.ndarray, None, None]]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images in an order.

    Attributes:
        source: what they are, for messages and reports.
        count: N.
        size: (height, width) of each, pixels.
        read: from ranges of positions, rising and apart, to a generator of their images, uint8
            [n,H,W,3].  Each process reads ranges of its own, in a thread.
        grey: whether the three channels were made of one.
        crop: side of the square that was cut out of each, pixels; None: nothing was.
        settings: what the images were drawn with, if that is known.
    """

    source: str
    count: int
    size: tuple[int, int]
    read: Reader
    grey: bool = False
    crop: int | None = None
    settings: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """All but how to read, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "read"}


class Array(NamedTuple):
    """What the header of an array in an .npz file says."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype
    num_bytes: int  # that follow the header


def open_images(
    source: str,
    *,
    crop: int | None = None,
    split: str = "train",
    data_dir: str | None = None,
) -> ImageSet:
    """Opens images, and reads as much as tells their number and size.

    Args:
        source: an .npz file; a folder of .npz files (shards, in the order of their names; of a
            folder of sample.py its samples.npz) or else of image files, at any depth; or the name
            of a data set, "digits", "cifar10" or one that TFDS has prepared.
        crop: side of the central square that is cut out as ADM does, pixels, of image files and
            TFDS's data sets; of digits the size itself.  None: images are taken whole.
        split: of a data set.
        data_dir: of a data set; None for the convention of TFDS.

    Raises:
        EvaluationError, DataError: there are none, or they are not such images.
    """
    name = source.removeprefix(FOLDER_PREFIX)
    if not name:
        raise EvaluationError(f"{source!r} names no images; expected a file, folder or data set")
    path = local_path(name)
    if path.is_dir():
        return _open_folder(path, crop)
    if path.is_file():
        return open_npz([path])
    if name != source or path.suffix or path.is_absolute():
        raise EvaluationError(f"no file or folder {path}")
    if source in SOURCES:
        return _open_source(source, crop, split, data_dir)
    images = open_labelled_images(source, split=split, data_dir=data_dir)

    def read_one(index: int) -> Image.Image:
        return images.read(index).image

    described = f"{images.source} {split}"
    return _decoded(described, len(images), read_one, images.name, crop)


def open_npz(paths: list[Path]) -> ImageSet:
    """The images of .npz files, one file's after another's.

    Grey images, [N,H,W,1], become RGB, and the set says that they were grey.

    Raises:
        EvaluationError: a file is damaged or cut short, needs pickles, or has no uint8 [N,H,W,3].
    """
    shapes = [_image_shape(path) for path in paths]
    for path, shape in zip(paths, shapes, strict=True):
        if shape[1:] != shapes[0][1:]:
            raise EvaluationError(
                f"{path} holds images {shape[1:]}, {paths[0].name} {shapes[0][1:]}; expected one "
                "size"
            )
    height, width, channels = shapes[0][1:]

    def read(ranges: Iterable[range]) -> Iterator[np.ndarray]:
        files = zip(paths, shapes, strict=True)
        rows = itertools.chain.from_iterable(_read_rows(path, *shape) for path, shape in files)
        position = 0
        for positions in ranges:
            collections.deque(itertools.islice(rows, positions.start - position), maxlen=0)
            joined = b"".join(itertools.islice(rows, len(positions)))
            position = positions.stop
            images = np.frombuffer(joined, np.uint8).reshape(-1, height, width, channels)
            yield np.broadcast_to(images, (*images.shape[:3], 3))
        collections.deque(rows, maxlen=0)  # checksums are compared at the end of files

    return ImageSet(
        source=str(paths[0] if len(paths) == 1 else paths[0].parent),
        count=sum(shape[0] for shape in shapes),
        size=(height, width),
        read=read,
        grey=channels == 1,
        settings=_find_settings(paths[0].parent),
    )


def npz_arrays(path: Path) -> dict[str, Array]:
    """What is in an .npz file, by name.

    Raises:
        EvaluationError: it is damaged, no .npz file, or an array is pickled.
    """
    arrays = {}
    with reporting_damage(path), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as file:
                header = _read_header(file)
                arrays[name] = Array(*header, entry.file_size - file.tell())
            if arrays[name].dtype.hasobject:
                raise EvaluationError(
                    f"{path}: {name} is pickled, and pickles can run any program; expected numbers"
                )
    return arrays


@contextlib.contextmanager
def reporting_damage(path: Path) -> Iterator[None]:
    """Turns what reading a damaged file raises into an EvaluationError."""
    try:
        yield
    except EvaluationError:
        raise
    except Exception as error:
        if not is_damage(error):
            raise
        raise EvaluationError(f"{path} is damaged or cut short: {error}") from error


def _image_shape(path: Path) -> tuple[int, ...]:
    """(N, H, W, C) of a file's images."""
    arrays = npz_arrays(path)
    if IMAGES_KEY not in arrays:
        raise EvaluationError(f"{path} holds {', '.join(arrays)}; expected {IMAGES_KEY}")
    shape, by_columns, dtype, num_bytes = arrays[IMAGES_KEY]
    found = f"{path}: {IMAGES_KEY} is {dtype} {list(shape)}"
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or by_columns:
        hint = ""
        if dtype.kind == "f":
            hint = " (from [-1,1]: clip(127.5 x + 128, 0, 255), from [0,1]: clip(255 x, 0, 255))"
        raise EvaluationError(f"{found}; expected uint8 [N,H,W,3] of pixels 0 .. 255{hint}")
    if not num_bytes or num_bytes != np.prod(shape, dtype=np.int64):
        raise EvaluationError(f"{found} in {num_bytes} bytes; expected a byte a value, and images")
    return shape


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether by columns, dtype) of an .npy file, which is then at its values."""
    return _HEADERS[np.lib.format.read_magic(file)](file)


def _read_rows(path: Path, count: int, *row_shape: int) -> Iterator[bytes]:
    """The bytes of each image of a file; its checksum is compared at the end."""
    size = int(np.prod(row_shape))
    with reporting_damage(path), zipfile.ZipFile(path) as archive:
        with archive.open(f"{IMAGES_KEY}.npy") as file:
            _read_header(file)
            for _ in range(count):
                row = file.read(size)
                if len(row) < size:
                    raise EOFError("the file ends too early")
                yield row
            file.read(1)  # the end, at the latest, has the checksum compared


def _open_folder(path: Path, crop: int | None) -> ImageSet:
    shards = sorted(path.glob("[!.]*.npz"))
    if path / SAMPLES_FILE in shards:
        shards = [path / SAMPLES_FILE]
    if shards:
        return open_npz(shards)
    extensions = open_formats()
    files = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if name[0] != "." and os.path.splitext(name)[1].lower() in extensions
    )
    if not files:
        raise EvaluationError(f"{path} holds neither .npz files nor images, and is no workdir")

    def read_one(index: int) -> Image.Image:
        return decode_rgb(retried(Path(files[index]).read_bytes))

    images = _decoded(str(path), len(files), read_one, files.__getitem__, crop)
    return dataclasses.replace(images, settings=_find_settings(path))


def _open_source(name: str, crop: int | None, split: str, data_dir: str | None) -> ImageSet:
    """A data set of pixels, as training reads it."""
    if name not in PIXEL_SIZES:
        raise EvaluationError(f"the data set {name!r} holds no pixels; expected images")
    options = dict(data_dir=data_dir, split=split, image_size=crop or PIXEL_SIZES[name])
    section = dict(name=name, random_flip=False, aspect_buckets=dict(count=0)) | options
    pixels = make_source(ConfigDict(section))
    height, width, channels = pixels.image_shape

    def read(ranges: Iterable[range]) -> Iterator[np.ndarray]:
        for positions in map(np.array, ranges):
            images = pixels.read(positions, positions, 0)["image"]
            yield np.broadcast_to(images, (*images.shape[:3], 3))

    described = f"{name} {split}"
    return ImageSet(described, len(pixels), (height, width), read, grey=channels == 1)


def _decoded(
    source: str,
    count: int,
    read_one: Callable[[int], Image.Image],
    name: Callable[[int], str],
    crop: int | None,
) -> ImageSet:
    """Images of which each is decoded by itself, a thread a CPU."""

    def load(index: int) -> np.ndarray:
        try:
            image = read_one(index)
            return np.asarray(image) if crop is None else centre_crop(image, crop)
        except (BadImageError, OSError) as error:
            raise EvaluationError(f"{name(index)} cannot be used: {error}") from error

    size = load(0).shape[:2]

    def load_same_size(index: int) -> np.ndarray:
        image = load(index)
        if image.shape[:2] != size:
            raise EvaluationError(
                f"{name(index)} has {shown_size(image.shape)} pixels, {name(0)} {shown_size(size)};"
                " expected one size, which a crop makes of them"
            )
        return image

    def read(ranges: Iterable[range]) -> Iterator[np.ndarray]:
        pool, started = ThreadPoolExecutor(len(os.sched_getaffinity(0))), collections.deque()
        try:
            for positions in ranges:
                started.append([pool.submit(load_same_size, index) for index in positions])
                if len(started) > _RANGES_AHEAD:
                    yield np.stack([image.result() for image in started.popleft()])
            while started:
                yield np.stack([image.result() for image in started.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)

    return ImageSet(source, count, size, read, crop=crop)


def shown_size(size: tuple[int, ...]) -> str:
    """HxW of (H, W, ...)."""
    return f"{size[0]}x{size[1]}"


def _find_settings(folder: Path) -> dict[str, Any] | None:
    """What sample.py has written beside its images; None if it did not make them."""
    path = folder / SETTINGS_FILE
    with reporting_damage(path):
        return json.loads(path.read_text()) if path.is_file() else None
