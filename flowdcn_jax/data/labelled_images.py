"""Images with labels as they lie on disk: a folder with a subfolder a class, or a TFDS data set."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from flowdcn_jax.data.errors import DataError, DataNotFoundError
from flowdcn_jax.data.image_decoding import BadImageError, decode_rgb, open_formats
from flowdcn_jax.data.prepared import (
    find_prepared,
    known_class_names,
    open_prepared,
    parse_record,
    resolve_data_dir,
)

FOLDER_PREFIX = "folder:"


class LabelledImage(NamedTuple):
    """An image and its class."""

    image: Image.Image  # RGB
    label: int


class LabelledImages(Protocol):
    """Images in a fixed order, some of which may turn out bad when they are read.

    Attributes:
        num_classes: labels are 0 .. num_classes - 1.
        class_names: their names in that order, or None.
        fingerprint: changes when the images, their order or their labels do, as far as that can be
            told without reading them.
        notes: what a user should know, a line each.
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    fingerprint: str
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call image `index` in a message."""
        ...

    def read(self, index: int) -> LabelledImage:
        """Image `index`; thread-safe.

        Raises:
            BadImageError: it cannot be read or decoded.
        """
        ...


def open_labelled_images(
    dataset: str, *, split: str, data_dir: str | os.PathLike | None
) -> LabelledImages:
    """Opens what the flag --dataset names.

    Args:
        dataset: "folder:PATH" for a folder with a subfolder a class, or the name of a TFDS data
            set that is prepared in `data_dir` ("imagenet2012", "imagenet2012_subset/1pct").
        split: of the TFDS data set; a folder has none and ignores it.
        data_dir: of the TFDS data set; None for the convention of TFDS.

    Raises:
        DataNotFoundError: no such folder or data set.
        DataError: it does not hold images with labels.
    """
    if dataset.startswith(FOLDER_PREFIX):
        return FolderImages(Path(dataset.removeprefix(FOLDER_PREFIX)).expanduser())
    return PreparedImages(dataset, split=split, data_dir=data_dir)


class FolderImages:
    """The image files of `root/<class>/**`; classes and files in the order of their names.

    Classes are the subfolders of `root`, also those without images: a label is the place of its
    class in the order of all names.  Files and folders whose name begins with a dot are left out,
    and files without the extension of an image format.  Symbolic links are followed, but no folder
    is visited twice for a class.
    """

    def __init__(self, root: Path):
        """Lists all files.

        Raises:
            DataNotFoundError: `root` is no folder.
            DataError: it has no class, a folder that cannot be listed, a class name that cannot be
                stored, or no image.
        """
        if not root.is_dir():
            raise DataNotFoundError(f"no folder {root}; expected one with a subfolder a class")
        self._root = root
        self._extensions = frozenset(open_formats())
        self._num_ignored, self._repeated = 0, []
        classes = [entry.name for entry in _listing(root) if _is_folder(entry)]
        if not classes:
            raise DataError(f"{root} has no subfolders; expected one a class, with its images")
        self._paths: list[str] = []  # below root
        self._labels: list[int] = []
        empty = []
        for label, name in enumerate(tqdm(classes, desc="listing", unit="class", delay=2)):
            _check_class_name(name, root)
            paths = sorted(self._walk(name, visited=set()))
            self._paths += paths
            self._labels += [label] * len(paths)
            if not paths:
                empty.append(name)
        if not self._paths:
            raise DataError(f"{root} has {len(classes)} classes and no image files in them")
        self.num_classes = len(classes)
        self.class_names = tuple(classes)
        self.fingerprint = self._fingerprint()
        self.notes = self._notes(empty)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """See `LabelledImages.name`; the path below the root."""
        return self._paths[index]

    def read(self, index: int) -> LabelledImage:
        """See `LabelledImages.read`."""
        try:
            encoded = (self._root / self._paths[index]).read_bytes()
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror}") from error
        return LabelledImage(decode_rgb(encoded), self._labels[index])

    def _walk(self, folder: str, *, visited: set[tuple[int, int]]) -> Iterator[str]:
        """Paths of the image files in root/folder and below it."""
        status = (self._root / folder).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in visited:
            self._repeated.append(folder)
            return
        visited.add(identity)
        for entry in _listing(self._root / folder):
            path = f"{folder}/{entry.name}"
            if _is_folder(entry):
                yield from self._walk(path, visited=visited)
            elif os.path.splitext(entry.name)[1].lower() in self._extensions:
                yield path
            else:
                self._num_ignored += 1

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, label in zip(self._paths, self._labels, strict=True):
            digest.update(b"%s\0%d\0" % (os.fsencode(path), label))
        return digest.hexdigest()

    def _notes(self, empty: Sequence[str]) -> tuple[str, ...]:
        notes = []
        if empty:
            notes.append(f"classes without images, which keep their labels: {_few(empty)}")
        if self._repeated:
            notes.append(f"links to folders that were visited before: {_few(self._repeated)}")
        if self._num_ignored:
            notes.append(f"{self._num_ignored} files without the extension of an image, ignored")
        return tuple(notes)


class PreparedImages:
    """A data set that TFDS has prepared in array_record files, with `image` and `label`."""

    def __init__(self, dataset: str, *, split: str, data_dir: str | os.PathLike | None):
        """Opens it; see `open_labelled_images`."""
        data_dir = resolve_data_dir(data_dir)
        folders = find_prepared(data_dir, [dataset])
        if not folders:
            raise DataNotFoundError(
                f"the TFDS data set {dataset!r} is not prepared in {data_dir}: prepare it with "
                "TFDS and file_format='array_record', name another folder, or use "
                "--dataset=folder:PATH"
            )
        if len(folders) > 1:
            choices = [f"{dataset}/{folder.parent.name}" for folder in folders]
            raise DataError(f"{dataset!r} is prepared in several configurations: {choices}")
        self._records, info = open_prepared(
            folders[0], names=[dataset.partition("/")[0]], split=split
        )
        features = dict(info.features.items())
        label = features.get("label")
        if not isinstance(label, tfds.features.ClassLabel):
            raise DataError(f"{dataset!r} has no class `label`; it has {sorted(features)}")
        if not isinstance(features.get("image"), tfds.features.Image):
            raise DataError(f"{dataset!r} has no `image` of encoded files: {features}")
        self.num_classes = int(label.num_classes)
        self.class_names = known_class_names(label)
        self.fingerprint = f"{info.full_name} {split} {len(self._records)}"
        self.notes = ()

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """See `LabelledImages.name`."""
        return f"record {index}"

    def read(self, index: int) -> LabelledImage:
        """See `LabelledImages.read`."""
        feature = parse_record(self._records[index])
        image = decode_rgb(feature["image"].bytes_list.value[0])
        return LabelledImage(image, feature["label"].int64_list.value[0])


def _listing(folder: Path) -> list[os.DirEntry]:
    """What is in a folder and not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from error
    return sorted(shown, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: listed as a file that cannot be read
        return False


def _check_class_name(name: str, root: Path) -> None:
    """TFDS keeps names a line each, without the spaces around them."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the class folder {name!r} of {root} is not named in UTF-8") from error
    if name != name.strip() or len(name.splitlines()) > 1:
        raise DataError(f"the class folder {name!r} of {root} has a line break or outer spaces")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
