"""CIFAR-10: prepared once from the forms it is handed over in, then read into memory.

The forms are .npz files of JPEGs, class folders, and the binary version. The Python version is a
pickle, which can run any code when it is loaded: it is refused.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from flowdcn_jax.data import prepared
from flowdcn_jax.data.image_files import BadImageError, decode_rgb
from flowdcn_jax.data.labelled_images import FolderImages, LabelledImage
from flowdcn_jax.data.prepared import DataError, DataNotFoundError
from flowdcn_jax.faults import is_damage, retried

IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10
SPLITS = ("train", "test")

_NPZ_KEYS = ("jpeg_bytes", "offsets", "labels", "class_names")
_BINARY_RECORD = 1 + 32 * 32 * 3  # bytes: a label, then the red, green and blue planes
_PICKLE_NAMES = re.compile(r"data_batch_\d|test_batch|batches\.meta|cifar-10-python\.tar\.gz")
_PICKLE_SUFFIXES = (".pkl", ".pickle")

LabelledPixels = tuple[np.ndarray, int]


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
    read: Callable[[], Iterator[LabelledPixels]]


class Cifar10Local(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """CIFAR-10 from files at hand: `image` uint8 [32, 32, 3], `label` 0 .. 9."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = prepared.NOTHING_TO_DOWNLOAD

    def __init__(self, splits: Mapping[str, SplitFiles], *, data_dir: Path):
        self._splits = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=IMAGE_SHAPE, dtype=np.uint8, encoding="bytes")
        label = prepared.class_label(NUM_CLASSES, self._splits["train"].class_names)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        return {name: self._generate_examples(name) for name in self._splits}

    def _generate_examples(self, name: str) -> Iterator[tuple[int, Any]]:
        files = self._splits[name]
        images = tqdm(files.read(), f"cifar10 {name}", total=files.count, unit="img", mininterval=1)
        for key, (image, label) in enumerate(images):
            yield key, {"image": image, "label": label}


_PREPARED_NAMES = (Cifar10Local.name, "cifar10")  # ours, then TFDS's own


def prepare_cifar10(
    sources: Sequence[str | Path], *, data_dir: str | os.PathLike | None
) -> tuple[Path, bool]:
    """Prepares CIFAR-10 from files; see `find_splits` for their forms.

    Args:
        sources: files or folders.
        data_dir: where prepared data sets live; None for the convention of TFDS.

    Returns:
        (folder, written): where it is, and False if it was there already.

    Raises:
        DataNotFoundError, DataError: the sources do not hold CIFAR-10; nothing was prepared.
    """
    data_dir = prepared.resolve_data_dir(data_dir)
    existing = prepared.newest_version(data_dir / Cifar10Local.name)
    if existing:
        return existing, False
    return prepared.write(Cifar10Local(find_splits(sources), data_dir=data_dir)), True


def read_prepared(
    data_dir: str | os.PathLike | None, split: str
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    """What was prepared, here or by TFDS itself.

    In memory a batch of 256 takes 2 ms; decoded record by record it would take 20 or more.

    Returns:
        (images, uint8 [N, 32, 32, 3]; labels, int32 [N]; names of the classes, if they are known).

    Raises:
        DataNotFoundError: it is not prepared; the message says how to prepare it.
        DataError: the split is not there, or the files are of another data set.
    """
    data_dir = prepared.resolve_data_dir(data_dir)
    folders = prepared.find_prepared(data_dir, _PREPARED_NAMES)
    if not folders:
        raise DataNotFoundError(
            f"cifar10 is not prepared in {data_dir} (no {' or '.join(_PREPARED_NAMES)} there); "
            "prepare it with: python -m flowdcn_jax.tools.prepare_data --dataset=cifar10 "
            f"--source=<file or folder> --data_dir={data_dir}"
        )
    records, info = prepared.open_prepared(folders[0], names=_PREPARED_NAMES, split=split)
    encoded = isinstance(info.features["image"], tfds.features.Image)  # TFDS's own, as PNG
    images = np.empty((len(records), *IMAGE_SHAPE), np.uint8)
    labels = np.empty(len(records), np.int32)
    for row in range(len(records)):
        feature = prepared.parse_record(retried(functools.partial(records.__getitem__, row)))
        stored = feature["image"].bytes_list.value[0]
        images[row] = (
            decode_rgb(stored) if encoded else np.frombuffer(stored, np.uint8).reshape(IMAGE_SHAPE)
        )
        labels[row] = feature["label"].int64_list.value[0]
    return images, labels, prepared.known_class_names(info.features["label"])


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
        present = [split for split in SPLITS if (source / split).is_dir()]
        return {split: _open_class_folders(source / split) for split in present}
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
    except Exception as error:
        if not is_damage(error):
            raise
        raise DataError(f"{path} is not an .npz of JPEGs: {error}") from error
    class_names = _checked_class_names([str(name) for name in names], path)
    labels = labels.astype(np.int64)
    _check_labels(labels, path)
    if offsets.shape != (len(labels) + 1,) or np.any(np.diff(offsets) <= 0):
        raise DataError(f"{path}: offsets must rise and be one more than the labels")
    if jpegs.dtype != np.uint8 or offsets[0] != 0 or offsets[-1] != jpegs.size:
        raise DataError(f"{path}: offsets do not span the uint8 jpeg_bytes")

    def decode(index: int) -> LabelledImage:
        encoded = jpegs[offsets[index] : offsets[index + 1]].tobytes()
        return LabelledImage(decode_rgb(encoded), int(labels[index]))

    def name(index: int) -> str:
        return f"image {index} of {path}"

    return SplitFiles(len(labels), class_names, lambda: _decoded(decode, len(labels), name))


def _open_class_folders(folder: Path) -> SplitFiles:
    images = FolderImages(folder)

    def name(index: int) -> str:
        return f"{folder}/{images.name(index)}"

    class_names = _checked_class_names(images.class_names, folder)
    return SplitFiles(len(images), class_names, lambda: _decoded(images.read, len(images), name))


def _decoded(
    decode: Callable[[int], LabelledImage], count: int, name: Callable[[int], str]
) -> Iterator[LabelledPixels]:
    for index in range(count):
        try:
            image, label = decode(index)
        except BadImageError as error:
            raise DataError(f"cannot decode {name(index)}: {error}") from error
        pixels = np.asarray(image)
        if pixels.shape != IMAGE_SHAPE:
            raise DataError(f"{name(index)} is {pixels.shape}, CIFAR-10 images are {IMAGE_SHAPE}")
        yield pixels, label


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
    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        if size == 0 or size % _BINARY_RECORD:
            raise DataError(
                f"{path} has {size} bytes, not records of {_BINARY_RECORD}: it is cut short or not "
                "of the binary version"
            )

    def read() -> Iterator[LabelledPixels]:
        for path in paths:
            records = np.fromfile(path, np.uint8).reshape(-1, _BINARY_RECORD)
            labels = records[:, 0].astype(np.int64)
            _check_labels(labels, path)
            images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            for image, label in zip(images, labels, strict=True):
                yield np.ascontiguousarray(image), int(label)

    return SplitFiles(sum(sizes) // _BINARY_RECORD, class_names, read)


def _checked_class_names(names: Sequence[str], path: Path) -> tuple[str, ...]:
    if len(set(names)) != NUM_CLASSES or len(names) != NUM_CLASSES:
        raise DataError(f"{path} has the classes {list(names)}, CIFAR-10 has {NUM_CLASSES}")
    return tuple(names)


def _check_labels(labels: np.ndarray, path: Path) -> None:
    if labels.ndim != 1 or len(labels) == 0:
        raise DataError(f"{path} holds no labels")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise DataError(
            f"{path}: labels must be 0 .. {NUM_CLASSES - 1}, found {labels.min()} .. {labels.max()}"
        )
