"""The work in progress: latents of a few images each, in files that are whole or not there.

All processes that share a job see one folder of parts.  Part p holds the images
`p * images_per_part ...` of the list, whoever encodes it, so that a job that was stopped goes on
with the parts that are missing.
"""

import contextlib
import json
import math
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowdcn_jax.caching.statistics import LatentStatistics
from flowdcn_jax.data import DataError, DataExistsError
from flowdcn_jax.files import atomic_write

# A stop loses at most the part being encoded: 256 images, 5000 of ImageNet's 1.28 million, or what
# fits in memory.
_MIN_IMAGES = 256
_MAX_PARTS = 256
_MAX_BYTES = 2**29

_SETTINGS_FILE = "settings.json"
_SUMMARY = "summary"

LatentSize = tuple[int, int]  # (h, w), latent pixels


class Skipped(NamedTuple):
    """An image that is not among the latents."""

    name: str
    reason: str


class PartSummary(NamedTuple):
    """What a part holds, less the arrays."""

    counts: dict[LatentSize, int]  # images of each size
    skipped: list[Skipped]
    statistics: LatentStatistics


class TooManyBadError(DataError):
    """More images than allowed cannot be used; the message names some."""


class Parts:
    """The parts of one job."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], *, num_images: int, image_bytes: int
    ):
        """Begins a job, or goes on with the one in `folder`.

        Args:
            folder: made if it is not there.
            settings: all that the latents depend on, in the types of JSON.
            num_images: length of the list of images.
            image_bytes: of the latents of one image.

        Raises:
            DataExistsError: `folder` holds parts that were made with other settings, or with
                unknown ones.
        """
        self.folder = folder
        self._num_images = num_images
        saved = _saved_start(folder)
        if saved is None:
            if any(folder.glob("part-*")):
                raise DataExistsError(
                    f"{folder} holds parts without {_SETTINGS_FILE}, so that nobody knows of what: "
                    "remove it, or name another --data_dir"
                )
            wanted = max(_MIN_IMAGES, math.ceil(num_images / _MAX_PARTS))
            images_per_part = max(1, min(wanted, _MAX_BYTES // image_bytes))
            saved = {"images_per_part": images_per_part, "settings": settings}
            with atomic_write(folder / _SETTINGS_FILE) as file:
                file.write(json.dumps(saved, indent=1).encode())
            saved = _saved_start(folder)  # perhaps of another process, which began as well
        if saved["settings"] != settings:
            how = difference(saved["settings"], settings)
            raise DataExistsError(
                f"{folder} holds the beginning of other latents ({how}): name another --data_dir, "
                "or remove it if it is not needed"
            )
        # The stored one: the rule may have changed since, and would give parts other images.
        self.images_per_part = saved["images_per_part"]
        self.count = math.ceil(num_images / self.images_per_part)

    def images(self, part: int) -> range:
        """The images of a part, as places in the list."""
        first = part * self.images_per_part
        return range(first, min(first + self.images_per_part, self._num_images))

    def missing(self) -> list[int]:
        """The parts that nobody has written yet."""
        return [part for part in range(self.count) if not self._path(part).exists()]

    def write(
        self,
        part: int,
        arrays: dict[LatentSize, dict[str, np.ndarray]],
        skipped: list[Skipped],
        statistics: LatentStatistics,
    ) -> None:
        """Writes a part; `arrays` maps sizes to moments [n,h,w,C] and labels [n].

        Where every std is zero they are left out.
        """
        summary = {"skipped": skipped, "statistics": statistics.to_json()}
        members = {_SUMMARY: np.frombuffer(json.dumps(summary).encode(), np.uint8)}
        for size, named in arrays.items():
            members |= {
                _member(size, name): array
                for name, array in named.items()
                if statistics.stochastic or not name.startswith("std")
            }
        with atomic_write(self._path(part)) as file:
            np.savez(file, **members)

    def summary(self, part: int) -> PartSummary:
        """What a written part holds; reads little of it."""
        with self._open(part) as file:
            saved = json.loads(file[_SUMMARY].tobytes())
            sizes = [_size(name) for name in file.files if name.endswith("/label")]
            counts = {size: len(file[_member(size, "label")]) for size in sizes}
        skipped = [Skipped(*entry) for entry in saved["skipped"]]
        return PartSummary(counts, skipped, LatentStatistics.from_json(saved["statistics"]))

    def examples(self, size: LatentSize, moments: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """All latents of one size, in the order of the list of images."""
        for part in range(self.count):
            with self._open(part) as file:
                if _member(size, "label") not in file.files:
                    continue
                arrays = {
                    name: file[_member(size, name)]
                    for name in (*moments, "label")
                    if _member(size, name) in file.files
                }
            left_out = dict.fromkeys(moments, np.zeros_like(arrays["mean"][0]))
            for row in range(len(arrays["label"])):
                yield left_out | {name: array[row] for name, array in arrays.items()}

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npz"

    @contextlib.contextmanager
    def _open(self, part: int) -> Iterator[np.lib.npyio.NpzFile]:
        path = self._path(part)
        try:
            with np.load(path, allow_pickle=False) as file:
                yield file
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is damaged: remove it and run again ({error})") from error


def remove_parts(folder: Path, settings: dict[str, Any]) -> None:
    """Removes the parts in `folder` if they were made with these settings.

    The settings go last: parts without them would be taken for those of another job.
    """
    saved = _saved_start(folder)
    if saved is None or saved["settings"] != settings:
        return
    with contextlib.suppress(OSError):  # what remains is in nobody's way, and removed next time
        for path in folder.iterdir():
            if path.name != _SETTINGS_FILE:
                path.unlink(missing_ok=True)
        shutil.rmtree(folder)


def _saved_start(folder: Path) -> dict[str, Any] | None:
    """{"images_per_part": .., "settings": {..}} as a job began, or None if none has."""
    try:
        return json.loads((folder / _SETTINGS_FILE).read_text())
    except FileNotFoundError:
        return None


def check_bad(skipped: list[Skipped], max_bad: int) -> None:
    """Raises TooManyBadError if more than `max_bad` images were skipped."""
    if len(skipped) > max_bad:
        last = "; ".join(f"{name}: {reason}" for name, reason in skipped[-3:])
        raise TooManyBadError(
            f"{len(skipped)} images cannot be used, more than --max_bad={max_bad}; the last: {last}"
        )


def difference(saved: Any, current: Any, key: str = "") -> str:
    """The first value in which two nested dicts differ: "autoencoder.name: 'a' -> 'b'"."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in [*current, *saved]:
            if saved.get(name) != current.get(name):
                return difference(saved.get(name), current.get(name), f"{key}.{name}".lstrip("."))
    return f"{key}: {saved!r} -> {current!r}"


def _member(size: LatentSize, name: str) -> str:
    return f"{size[0]}x{size[1]}/{name}"


def _size(member: str) -> LatentSize:
    height, width = member.partition("/")[0].split("x")
    return int(height), int(width)
