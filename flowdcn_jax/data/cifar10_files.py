"""The forms CIFAR-10 is handed over in: .npz of JPEGs, class folders, binary version.

The Python version is a pickle, which can run any code when it is loaded: it is refused.
"""

import dataclasses
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from flowdcn_jax.data.errors import DataError, DataNotFoundError

IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10
SPLITS = ("train", "test")

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_NPZ_KEYS = ("jpeg_bytes", "offsets", "labels", "class_names")
_BINARY_RECORD = 1 + 32 * 32 * 3  # bytes: a label, then the red, green and blue planes
_PICKLE_NAMES = re.compile(r"data_batch_\d|test_batch|batches\.meta|cifar-10-python\.tar\.gz")
_PICKLE_SUFFIXES = (".pkl", ".pickle")

LabelledImage = tuple[np.ndarray, int]


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """One split, found and checked but not yet decoded.

    Attributes:
        count: number of images.
        class_names: names of the ten classes, in the order of the labels.
        read: starts an iteration over (uint8 [32, 32, 3], label 0 .. 9); it raises DataError,
            naming the file, at an image it cannot use.
    """

    count: int
    class_names: tuple[str, ...]
    read: Callable[[], Iterator[LabelledImage]]


def find_splits(sources: Sequence[str | Path]) -> dict[str, SplitFiles]:
    """Finds CIFAR-10 in files and folders.

    Args:
        sources: each an .npz file whose name says train or test, a folder of such files, a
            folder with `train/<class>/*.png|jpg` (and `test/...`), or the folder of the binary
            version (`data_batch_*.bin`, `test_batch.bin`, `batches.meta.txt`).

    Returns:
        "train", and "test" if it is there.

    Raises:
        DataNotFoundError: a source does not exist.
        DataError: a source is none of these forms, is a Python pickle, names a split twice, or
            contradicts itself or another source; or there is no train split.
    """
    splits: dict[str, SplitFiles] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise DataNotFoundError(f"no such file or folder: {source}")
        for split, files in _open_source(source).items():
            if split in splits:
                raise DataError(f"the {split} split is given twice, the second time by {source}")
            splits[split] = files
    if "train" not in splits:
        raise DataError(f"no train split in {', '.join(map(str, sources)) or 'no source'}")
    names = {files.class_names for files in splits.values()}
    if len(names) > 1:
        raise DataError(f"train and test name their classes differently: {sorted(names)}")
    return splits


def _open_source(source: Path) -> dict[str, SplitFiles]:
    if source.is_file():
        _refuse_pickle([source])
        if source.suffix != ".npz":
            raise DataError(f"{source} is not an .npz file; unpack archives and name the folder")
        return _open_npz([source])
    entries = sorted(source.iterdir())
    if any(path.match("data_batch_*.bin") for path in entries):
        return _open_binary(source)
    if (source / "train").is_dir():
        return _open_class_folders(source)
    _refuse_pickle(entries)
    npz_files = [path for path in entries if path.suffix == ".npz" and _split_in_name(path)]
    cifar_files = [path for path in npz_files if "cifar10" in path.name] or npz_files
    if cifar_files:
        return _open_npz(cifar_files)
    raise DataError(
        f"{source} holds no *train*.npz, no train/<class> folders and no data_batch_*.bin"
    )


def _refuse_pickle(paths: Sequence[Path]) -> None:
    for path in paths:
        if _PICKLE_NAMES.fullmatch(path.name) or path.suffix in _PICKLE_SUFFIXES:
            raise DataError(
                f"{path} is the Python version of CIFAR-10, a pickle, which could run any code "
                "and is not read: fetch the binary version (cifar-10-binary.tar.gz), unpack it "
                "and name its folder"
            )


# --- .npz of JPEGs ---------------------------------------------------------------------------


def _split_in_name(path: Path) -> str | None:
    return next((split for split in SPLITS if split in path.stem), None)


def _open_npz(paths: Sequence[Path]) -> dict[str, SplitFiles]:
    splits = {}
    for path in paths:
        split = _split_in_name(path)
        if split is None:
            raise DataError(f"the name of {path} must say which split it holds: train or test")
        if split in splits:
            raise DataError(f"{path.parent} has more than one .npz file of the {split} split")
        splits[split] = _open_one_npz(path)
    return splits


def _open_one_npz(path: Path) -> SplitFiles:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in _NPZ_KEYS if key not in archive.files]
            if missing:
                raise ValueError(f"it lacks {missing} (it has {sorted(archive.files)})")
            jpegs, offsets, labels, names = (archive[key] for key in _NPZ_KEYS)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz of JPEGs: {error}") from error
    class_names = _checked_class_names([str(name) for name in names], path)
    labels = labels.astype(np.int64)
    _check_labels(labels, path)
    if offsets.shape != (len(labels) + 1,) or np.any(np.diff(offsets) <= 0):
        raise DataError(f"{path}: offsets must rise and be one more than the labels")
    if jpegs.dtype != np.uint8 or offsets[0] != 0 or offsets[-1] != jpegs.size:
        raise DataError(f"{path}: offsets do not span the uint8 jpeg_bytes")

    def read() -> Iterator[LabelledImage]:
        for index, label in enumerate(labels):
            encoded = jpegs[offsets[index] : offsets[index + 1]].tobytes()
            yield _decode(io.BytesIO(encoded), f"image {index} of {path}"), int(label)

    return SplitFiles(len(labels), class_names, read)


# --- class folders ---------------------------------------------------------------------------


def _open_class_folders(folder: Path) -> dict[str, SplitFiles]:
    present = [split for split in SPLITS if (folder / split).is_dir()]
    return {split: _open_one_class_folder(folder / split) for split in present}


def _open_one_class_folder(folder: Path) -> SplitFiles:
    class_names = _checked_class_names(
        sorted(path.name for path in folder.iterdir() if path.is_dir()), folder
    )
    paths = [
        (path, label)
        for label, name in enumerate(class_names)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in _IMAGE_SUFFIXES
    ]
    if not paths:
        raise DataError(f"the class folders of {folder} hold no {'/'.join(_IMAGE_SUFFIXES)}")

    def read() -> Iterator[LabelledImage]:
        for path, label in paths:
            yield _decode(path, str(path)), label

    return SplitFiles(len(paths), class_names, read)


def _decode(file: io.BytesIO | Path, description: str) -> np.ndarray:
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot decode {description}: {error}") from error
    if pixels.shape != IMAGE_SHAPE:
        raise DataError(f"{description} is {pixels.shape}, CIFAR-10 images are {IMAGE_SHAPE}")
    return pixels


# --- binary version --------------------------------------------------------------------------


def _open_binary(folder: Path) -> dict[str, SplitFiles]:
    meta = folder / "batches.meta.txt"
    if not meta.is_file():
        raise DataNotFoundError(f"{folder} has data_batch_*.bin but no batches.meta.txt")
    class_names = _checked_class_names(meta.read_text(encoding="utf-8").split(), meta)
    splits = {"train": _open_binary_files(sorted(folder.glob("data_batch_*.bin")), class_names)}
    test_file = folder / "test_batch.bin"
    if test_file.is_file():
        splits["test"] = _open_binary_files([test_file], class_names)
    return splits


def _open_binary_files(paths: Sequence[Path], class_names: tuple[str, ...]) -> SplitFiles:
    for path in paths:
        if path.stat().st_size == 0 or path.stat().st_size % _BINARY_RECORD:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, not records of {_BINARY_RECORD}: "
                "it is cut short or not of the binary version"
            )

    def read() -> Iterator[LabelledImage]:
        for path in paths:
            records = np.fromfile(path, np.uint8).reshape(-1, _BINARY_RECORD)
            labels = records[:, 0].astype(np.int64)
            _check_labels(labels, path)
            images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            for image, label in zip(images, labels, strict=True):
                yield np.ascontiguousarray(image), int(label)

    count = sum(path.stat().st_size for path in paths) // _BINARY_RECORD
    return SplitFiles(count, class_names, read)


def _checked_class_names(names: list[str], path: Path) -> tuple[str, ...]:
    if len(set(names)) != NUM_CLASSES or len(names) != NUM_CLASSES:
        raise DataError(f"{path} has the classes {names}, CIFAR-10 has {NUM_CLASSES}")
    return tuple(names)


def _check_labels(labels: np.ndarray, path: Path) -> None:
    if labels.ndim != 1 or len(labels) == 0:
        raise DataError(f"{path} holds no labels")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise DataError(
            f"{path}: labels must be 0 .. {NUM_CLASSES - 1}, found {labels.min()} .. {labels.max()}"
        )
