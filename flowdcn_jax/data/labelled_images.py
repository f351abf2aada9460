"""Images with labels as they lie on disk: a folder with a subfolder a class, or a TFDS data set."""

import collections
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from flowdcn_jax.data import prepared
from flowdcn_jax.data.image_files import BadImageError, decode_rgb, open_formats
from flowdcn_jax.data.prepared import DataError, DataNotFoundError
from flowdcn_jax.faults import retried, shown
from flowdcn_jax.files import local_path

FOLDER_PREFIX = "folder:"

# An image file as large as 8-bit RGB of the most pixels that Pillow takes.
_MAX_FILE_BYTES = 2**29

# What is wrong with a path itself.  Any other error may be gone at the next attempt: a disk or a
# network that fails, too many open files.
_BAD_PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}

# Folders of systems and of their storage, in lower case; never classes.
_SYSTEM_FOLDERS = {
    "lost+found",
    "__macosx",
    "@eadir",
    "@recycle",
    "@tmp",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "found.000",
    "__pycache__",
}

_Identity = tuple[int, int]  # of a folder, by whatever path: device and inode


class LabelledImage(NamedTuple):
    """An image and its class."""

    image: Image.Image  # RGB
    label: int


class LabelledImages(Protocol):
    """Images in a fixed order, some of which may turn out bad when they are read.

    Attributes:
        source: where they are, the same however a user spells it.
        num_classes: labels are 0 .. num_classes - 1.
        class_names: their names in that order, or None.
        fingerprint: changes when the images, their order, their labels or the classes do, as far
            as that can be told without reading the images.
        notes: what a user should know, a line each.
    """

    source: str
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
            BadImageError: it cannot be read or decoded, at another time neither.
            MemoryError, OSError: the machine's fault, not the image's.
        """
        ...


def open_labelled_images(
    dataset: str,
    *,
    split: str,
    data_dir: str | os.PathLike | None,
    output_dir: Path | None = None,
    class_list: Path | None = None,
) -> LabelledImages:
    """Opens what the flag --dataset names.

    Args:
        dataset: "folder:PATH" for a folder with a subfolder a class, or the name of a TFDS data
            set that is prepared in `data_dir` ("imagenet2012", "imagenet2012_subset/1pct").
        split: of the TFDS data set, a name or a slice; a folder has none, and no slices.
        data_dir: of the TFDS data set; None for the convention of TFDS.
        output_dir: where something is to be made of the images; must not be among them.
        class_list: a file with the names of a folder's classes, a line each, in the order of their
            labels; see `FolderImages`.

    Raises:
        DataNotFoundError: no such folder or data set.
        DataError: it does not hold images with labels, or the split or `output_dir` will not do.
    """
    name = prepared.split_name(split)
    if not dataset.startswith(FOLDER_PREFIX):
        if class_list is not None:
            raise DataError(f"{class_list} is of a folder's classes; {dataset!r} has its own")
        return PreparedImages(dataset, split=split, data_dir=data_dir)
    path = dataset.removeprefix(FOLDER_PREFIX)
    if not path:
        raise DataError(f"{dataset!r} names no folder; expected folder:PATH")
    if split != name:
        raise DataError(f"the split is {split!r}; expected a name: a folder has no slices")
    root = local_path(path)
    if output_dir is not None:
        _check_outside(output_dir, root)
    return FolderImages(root, None if class_list is None else read_class_list(class_list))


def read_class_list(path: Path) -> tuple[str, ...]:
    """The names in a file, a line each; empty lines do not count.

    Raises:
        DataError: it is not such a file, or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"{path} is not a list of names in UTF-8: {error}") from error
    names = tuple(name for line in lines if (name := line.strip()))
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice or not names:
        raise DataError(
            f"{path} names {_few(twice)} twice" if twice else f"{path} holds no names of classes"
        )
    return names


class FolderImages:
    """The image files of `root/<class>/**`; classes and files in the order of their names.

    Classes are the subfolders of `root`, also those without images: a label is the place of its
    class in the order of all names, which is that of numbers where all names are numbers.  A list
    of classes fixes them, and their order, whatever folders come and go.  Files and folders whose
    name begins with a dot are left out, folders of the system (`lost+found`), and files without the
    extension of an image format.  Symbolic links are followed, but no folder is visited twice for a
    class, nor one that is a class of its own, nor `root` or what it is in.

    Names may be of any bytes; `class_names` and messages have escapes for what is not UTF-8.
    """

    def __init__(self, root: Path, class_list: Sequence[str] | None = None):
        """Lists all files.

        Args:
            root: holds a folder a class.
            class_list: names of classes in the order of their labels.  One without a folder keeps
                its label; folders of other names are left out.  None: all folders are classes.

        Raises:
            DataNotFoundError: `root` is no folder.
            DataError: it has no class, a folder that cannot be listed, a class name that cannot be
                stored, or no image.
        """
        if not root.is_dir():
            raise DataNotFoundError(f"no folder {root}; expected one with a subfolder a class")
        self._root = root
        self._class_list = class_list
        self.source = f"{FOLDER_PREFIX}{shown(os.path.realpath(root))}"
        self._extensions = frozenset(open_formats())
        self._num_ignored = 0
        self._left_out: list[str] = []  # folders that are visited elsewhere, or for ever
        self._of_system: list[str] = []  # folders
        self._not_listed: list[str] = []  # folders that the list of classes does not name
        self._paths: list[str] = []  # below root
        self._labels: list[int] = []
        try:
            self._list()
        except OSError as error:
            raise DataError(f"cannot list {shown(error.filename)}: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """See `LabelledImages.name`; the path below the root."""
        return shown(self._paths[index])

    def read(self, index: int) -> LabelledImage:
        """See `LabelledImages.read`."""
        path = self._root / self._paths[index]
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its other end
                raise BadImageError("not a regular file")
            if status.st_size > _MAX_FILE_BYTES:
                raise BadImageError(f"{status.st_size} bytes, more than {_MAX_FILE_BYTES}")
            encoded = path.read_bytes()
        except OSError as error:
            if error.errno not in _BAD_PATH:
                raise
            raise BadImageError(f"cannot be read: {error.strerror}") from error
        return LabelledImage(decode_rgb(encoded), self._labels[index])

    def _list(self) -> None:
        """Finds classes and files, and all that follows from them; OSError."""
        containing = _containing(self._root)
        folders = {
            entry.name: _identity(entry) for entry in self._listing(self._root) if _is_folder(entry)
        }
        classes = {name: own for name, own in folders.items() if own not in containing}
        self._left_out += [name for name in folders if name not in classes]
        classes = self._in_order(classes)
        if not classes:
            raise DataError(
                f"{self._root} has no subfolders; expected one a class, with its images"
            )
        for name in classes:
            _check_class_name(name, self._root)
        self._not_below_classes = containing | set(filter(None, classes.values()))
        digest = hashlib.sha256(repr([shown(name) for name in classes]).encode())
        empty = []
        for label, name in enumerate(tqdm(classes, desc="listing", unit="class", delay=2)):
            there = classes[name] is not None
            files = sorted(self._walk(name, visited=set())) if there else []
            self._paths += [path for path, _ in files]
            self._labels += [label] * len(files)
            for path, size in files:
                digest.update(b"%s\0%d\0%d\0" % (os.fsencode(path), label, size))
            if not files:
                empty.append(name)
        if not self._paths:
            raise DataError(f"{self._root} has {len(classes)} classes and no image files in them")
        self.num_classes = len(classes)
        self.class_names = tuple(map(shown, classes))
        self.fingerprint = digest.hexdigest()
        own = [identity for identity in classes.values() if identity is not None]
        self.notes = self._notes(empty, shared=len(set(own)) < len(own))

    def _in_order(self, folders: dict[str, _Identity]) -> dict[str, _Identity | None]:
        """The classes in the order of their labels, of the folders in the order of their names."""
        if self._class_list is None:
            numbers = all(name.isascii() and name.isdecimal() for name in folders)
            return (
                dict(sorted(folders.items(), key=lambda item: int(item[0]))) if numbers else folders
            )
        by_name = {shown(name): name for name in folders}
        self._not_listed += [by_name[name] for name in by_name.keys() - set(self._class_list)]
        names = [by_name.get(name, name) for name in self._class_list]
        classes = {name: folders.get(name) for name in names}
        if not any(classes.values()):
            raise DataError(f"none of the classes listed is a folder of {shown(self._root)}")
        return classes

    def _listing(self, folder: Path) -> list[os.DirEntry]:
        """What is in a folder and neither hidden nor the system's, by name."""
        entries = retried(lambda: _entries(folder))
        kept = [entry for entry in entries if entry.name.lower() not in _SYSTEM_FOLDERS]
        below = os.path.relpath(folder, self._root)
        self._of_system += [
            entry.name if below == "." else f"{below}/{entry.name}"
            for entry in entries
            if entry.name.lower() in _SYSTEM_FOLDERS
        ]
        return kept

    def _walk(self, folder: str, *, visited: set[_Identity]) -> Iterator[tuple[str, int]]:
        """Paths and sizes of the image files in root/folder and below it."""
        for entry in self._listing(self._root / folder):
            path = f"{folder}/{entry.name}"
            if _is_folder(entry):
                identity = _identity(entry)
                if identity in visited or identity in self._not_below_classes:
                    self._left_out.append(path)
                else:
                    visited.add(identity)
                    yield from self._walk(path, visited=visited)
            elif os.path.splitext(entry.name)[1].lower() in self._extensions:
                yield path, _file_size(entry)
            else:
                self._num_ignored += 1

    def _notes(self, empty: Sequence[str], *, shared: bool) -> tuple[str, ...]:
        notes = []
        if empty:
            notes.append(f"classes without images, which keep their labels: {_few(empty)}")
        if shared:
            notes.append("some classes are links to one folder: its images are in each of them")
        if self._left_out:
            notes.append(
                "folders left out, as they are visited elsewhere or contain the classes: "
                f"{_few(self._left_out)}"
            )
        if self._of_system:
            notes.append(f"folders of the system, left out: {_few(self._of_system)}")
        if self._not_listed:
            notes.append(f"folders that the list of classes leaves out: {_few(self._not_listed)}")
        if self._num_ignored:
            notes.append(f"{self._num_ignored} files without the extension of an image, ignored")
        return tuple(notes)


class PreparedImages:
    """A data set that TFDS has prepared in array_record files, with `image` and `label`."""

    def __init__(self, dataset: str, *, split: str, data_dir: str | os.PathLike | None):
        """Opens it; see `open_labelled_images`."""
        data_dir = prepared.resolve_data_dir(data_dir)
        folders = prepared.find_prepared(data_dir, [dataset])
        if not folders:
            raise DataNotFoundError(
                f"the TFDS data set {dataset!r} is not prepared in {data_dir}: use "
                "--dataset=folder:PATH (for ImageNet folder:ILSVRC/Data/CLS-LOC/train), name "
                "another folder, or prepare it with TFDS and file_format='array_record', which "
                "takes TensorFlow above 1 GB (docs/data.md has the command)"
            )
        if len(folders) > 1:
            choices = [f"{dataset}/{folder.parent.name}" for folder in folders]
            raise DataError(f"{dataset!r} is prepared in several configurations: {choices}")
        self._records, info = prepared.open_prepared(folders[0], names=[dataset], split=split)
        features = dict(info.features.items())
        label = features.get("label")
        if not isinstance(label, tfds.features.ClassLabel):
            raise DataError(f"{dataset!r} has no class `label`; it has {sorted(features)}")
        if not isinstance(features.get("image"), tfds.features.Image):
            raise DataError(f"{dataset!r} has no `image` of encoded files: {features}")
        self.source = info.full_name
        self.num_classes = int(label.num_classes)
        self.class_names = prepared.known_class_names(label)
        self.fingerprint = f"{info.full_name} {split} {len(self._records)}"
        self.notes = ()

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """See `LabelledImages.name`."""
        return f"record {index}"

    def read(self, index: int) -> LabelledImage:
        """See `LabelledImages.read`."""
        feature = prepared.parse_record(self._records[index])
        image = decode_rgb(feature["image"].bytes_list.value[0])
        return LabelledImage(image, feature["label"].int64_list.value[0])


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder and not hidden, by name."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(shown, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno not in _BAD_PATH:
            raise
        return False  # such as a link that leads to itself: a file that cannot be read


def _file_size(entry: os.DirEntry) -> int:
    """Bytes; -1 if that cannot be told."""
    try:
        return entry.stat().st_size
    except OSError as error:
        if error.errno not in _BAD_PATH:
            raise
        return -1


def _identity(folder: Path | os.DirEntry) -> _Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _containing(folder: Path) -> set[_Identity]:
    """Of `folder` and of all folders that it is in."""
    real = Path(os.path.realpath(folder))
    return {_identity(path) for path in (real, *real.parents)}


def _check_outside(output_dir: Path, root: Path) -> None:
    real, real_root = (Path(os.path.realpath(path)) for path in (output_dir, root))
    if real.is_relative_to(real_root):
        raise DataError(
            f"{output_dir} is in {root}, the folder of the images, where it would become a class: "
            "name a folder elsewhere"
        )


def _check_class_name(name: str, root: Path) -> None:
    """TFDS keeps names a line each, without the spaces around them."""
    if name != name.strip() or len(name.splitlines()) > 1:
        raise DataError(f"the class folder {name!r} of {root} has a line break or outer spaces")


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:5])) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
