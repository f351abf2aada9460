"""Data sets that TFDS has prepared as ArrayRecord files: finding, opening and writing them.

Neither needs TensorFlow. TFDS writes into a folder `incomplete.*` and renames it when all is there,
so an interrupted preparation leaves nothing that looks prepared.
"""

import bisect
import contextlib
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from flowdcn_jax.errors import UserError
from flowdcn_jax.faults import (
    DamagedError,
    MachineError,
    as_line,
    is_damage,
    machine_status,
    retried,
)
from flowdcn_jax.files import flush, local_path

# The `url_infos` of builders. Else TFDS 4.9.10 looks for checksums with the package
# importlib_resources, which it does not declare and so may not be there.
NOTHING_TO_DOWNLOAD: Mapping[str, Any] = {}

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_SPLIT = re.compile(r"(\w+)(\[[^\[\]]*\])?", re.ASCII)
_INFO_FILE = "dataset_info.json"  # TFDS writes it last and renames the whole folder after that
_METADATA_FILE = "metadata.json"
_EXAMPLE = (
    '{"settings": {"autoencoder": {"name": "sd_vae", "weights_sha256": null, "scale": 0.18215, '
    '"shift": 0.0}}}'
)


class DataError(UserError, ValueError):
    """An option out of range, or a file that does not hold what it should."""


class DataNotFoundError(UserError, FileNotFoundError):
    """A data set that is not prepared, or a file that is missing; the message says what to do."""


class DataExistsError(UserError, FileExistsError):
    """A data set that would be overwritten."""


class Encoder(NamedTuple):
    """The autoencoder that made cached latents; models work on x = (latents - shift) * scale."""

    name: str  # as in config.autoencoder
    weights_sha256: str | None  # None: not known
    scale: float
    shift: float


def resolve_data_dir(data_dir: str | os.PathLike | None) -> Path:
    """The folder of prepared data sets.

    None means the convention of TFDS: the environment variable TFDS_DATA_DIR, or
    `~/tensorflow_datasets`.
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or Path("~") / "tensorflow_datasets"
    return local_path(data_dir)


def split_name(split: str) -> str:
    """The name in `split`, "train" or a slice of it such as "train[:1000]".

    Raises:
        DataError: neither; TFDS would take parts of it for folders, or find no name.
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise DataError(
            f"the split is {split!r}; expected a name of letters, digits and _, such as 'train', "
            "or a slice such as 'train[:1000]'"
        )
    return match[1]


def newest_version(parent: Path) -> Path | None:
    """The complete data set of the highest version directly in `parent`, or None."""
    versions = [
        (tuple(map(int, match.groups())), info.parent)
        for info in parent.glob(f"*/{_INFO_FILE}")
        if (match := _VERSION.fullmatch(info.parent.name))
    ]
    return max(versions)[1] if versions else None


def find_prepared(data_dir: Path, names: Sequence[str]) -> list[Path]:
    """Folders of complete data sets, the newest version of each configuration.

    In the order of `names`, then by configuration.

    Args:
        data_dir: holds `<name>/<version>` or `<name>/<config>/<version>`; or is such a folder.
        names: TFDS names, with a configuration ("name/config") or without.

    Raises:
        DataError: `data_dir` is such a folder, of another data set.
    """
    if (data_dir / _INFO_FILE).is_file():
        _check_name(data_dir, _builder(data_dir).name, names)
        return [data_dir]
    found = []
    for name in names:
        parents = [data_dir / name, *sorted((data_dir / name).glob("*"))]
        found += [folder for parent in parents if (folder := newest_version(parent))]
    return found


def open_prepared(folder: Path, *, names: Sequence[str], split: str) -> tuple[Any, Any]:
    """Opens a split, or a slice of it, of a data set in a folder from `find_prepared`.

    Returns:
        (records, info): a sequence of serialised examples (bytes), `Records`, and the
        `tfds.core.DatasetInfo`, whose `features` decode them.

    Raises:
        DataNotFoundError: files of the split are missing.
        DataError: the data set has none of `names`, not this split or not the ArrayRecord format.
    """
    builder = _builder(folder)
    info = builder.info
    _check_name(folder, builder.name, names)
    if info.file_format.value != "array_record":
        raise DataError(
            f"{folder} is in the format {info.file_format.value}, which needs TensorFlow: prepare "
            "it with file_format='array_record'"
        )
    name = split_name(split)
    if name not in info.splits:
        raise DataError(f"no split {split!r} in {folder}; it has {sorted(info.splits)}")
    missing = [path for path in info.splits[name].filepaths if not Path(path).is_file()]
    if missing:
        raise DataNotFoundError(
            f"{folder} lacks {len(missing)} of the files of {name!r}, among them "
            f"{Path(missing[0]).name}: remove the folder and prepare it again"
        )
    raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        source = builder.as_data_source(split, deserialize_method=raw_bytes)
        return Records(source, info.splits[split].file_instructions), info
    except ValueError as error:
        raise DataError(f"cannot read the split {split!r} of {folder}: {error}") from error


class Records(Sequence):
    """Serialised examples, read one at a time; thread-safe."""

    def __init__(self, source: Any, files: Sequence[Any]):
        """`files`: TFDS's file instructions, in the order of `source`."""
        self._source = source
        self._files = [file.filename for file in files]
        self._ends = list(itertools.accumulate(file.take for file in files))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        """Raises DataError if the file is damaged, MachineError if it cannot be read now."""
        try:
            record = self._source[index]
            if not record:  # what array_record gives of some files that were cut
                raise DamagedError(f"record {index} is empty")
            return record
        except Exception as error:
            file = self._files[bisect.bisect_right(self._ends, index)]
            if is_damage(error):
                raise DataError(
                    f"{file} is damaged ({as_line(error)}): put an undamaged copy in its place, or "
                    "prepare the data set again"
                ) from error
            status = machine_status(error)
            if status is None:
                raise
            raise MachineError(f"{file} cannot be read: {as_line(error)}", status) from error


def _builder(folder: Path) -> tfds.core.DatasetBuilder:
    """The data set in a folder; DataError if what describes it is damaged."""
    try:
        return retried(lambda: tfds.builder_from_directory(folder))
    except Exception as error:  # whatever a damaged file makes TFDS raise
        if machine_status(error) is not None:
            raise
        raise DataError(
            f"{folder} holds no data set that can be opened: its {_INFO_FILE} or features.json is "
            f"damaged ({as_line(error)})"
        ) from error


def _check_name(folder: Path, name: str, names: Sequence[str]) -> None:
    if name not in {expected.partition("/")[0] for expected in names}:
        raise DataError(f"{folder} holds the data set {name!r}, not {' or '.join(names)}")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The metadata that a data set was prepared with, its metadata.json, or None."""
    path = folder / _METADATA_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(retried(path.read_bytes))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return manifest


def find_encoder(manifest: Mapping[str, Any] | None, *, where: str = "the manifest") -> Encoder:
    """The encoder that a manifest, or a data set's `identity`, names under settings.autoencoder.

    Args:
        manifest: contents of metadata.json, or None where there is none.
        where: begins the message of an error.

    Raises:
        DataError: it names no encoder, or one without a positive scale and a shift.
    """
    try:
        found = manifest["settings"]["autoencoder"]
        encoder = Encoder(*(found[field] for field in Encoder._fields))
        whole = math.isfinite(encoder.shift) and 0 < encoder.scale < math.inf
    except (TypeError, KeyError):
        whole = False
    if not whole:
        raise DataError(
            f"{where} does not say which autoencoder encoded the latents, with which scale and "
            "shift: cache them again with flowdcn_jax.tools.cache_latents, or let it hold "
            f"{_EXAMPLE} with the values of the one that did"
        )
    return encoder


def parse_record(record: bytes) -> Mapping[str, Any]:
    """The protocol buffers of a record's features, by name.

    A feature has `bytes_list.value[0]` or `int64_list.value[0]`.  TFDS's own decoding to NumPy
    takes four times as long, under the interpreter's lock.
    """
    return tf_example_pb2.Example.FromString(record).features.feature


def known_class_names(label_feature: Any) -> tuple[str, ...] | None:
    """Names of a `tfds.features.ClassLabel`, or None if it holds only their number."""
    names = tuple(label_feature.names)
    return None if names == tuple(map(str, range(len(names)))) else names


def class_label(num_classes: int, class_names: Sequence[str] | None) -> Any:
    """The `tfds.features.ClassLabel` of so many classes, with their names if there are any."""
    return tfds.features.ClassLabel(
        names=class_names, num_classes=None if class_names else num_classes
    )


def write(builder: tfds.core.DatasetBuilder) -> Path:
    """Has a builder write its data set, flushed to the disk; returns the folder."""
    tfds.disable_progress_bar()  # the builders show their own, which know the total
    # TFDS prints that it downloads, though nothing is fetched; the commands say what they made.
    builder._log_download_bytes = builder._log_download_done = lambda: None
    with tempfile.TemporaryDirectory() as downloads:  # else TFDS leaves an empty folder
        builder.download_and_prepare(download_dir=downloads)
    folder = Path(builder.data_dir)
    for path in folder.iterdir():
        flush(path)
    with contextlib.suppress(OSError):  # some network file systems cannot do this with folders
        flush(folder)
        flush(folder.parent)
    return folder
