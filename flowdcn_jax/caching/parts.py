"""The work in progress: latents of a few images each, in a resumable folder of parts.

All processes that share a job see one folder.  Part p holds the images `p * images_per_part ...`
of the list, whoever encodes it, so that a job that was stopped goes on with the parts that are
missing.
"""

import contextlib
import dataclasses
import json
import math
import operator
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from flowdcn_jax.caching.job import Job, Size
from flowdcn_jax.data import DataError
from flowdcn_jax.runs.contents import DATA, check_is_for
from flowdcn_jax.runs.folder import RECORD_FILE, ResumableFolder, differences, read_array

# A stop loses at most the part being encoded: 256 images, 5000 of ImageNet's 1.28 million, or what
# fits in memory.
_MIN_IMAGES = 256
_MAX_PARTS = 256
_MAX_BYTES = 2**29

_SUMMARY = "summary"


class Skipped(NamedTuple):
    """An image that is not among the latents."""

    name: str
    reason: str


class TooManyBadError(DataError):
    """More images than allowed cannot be used; the message names some."""


def check_bad(skipped: list[Skipped], max_bad: int) -> None:
    """Raises TooManyBadError if more than `max_bad` images were skipped."""
    if len(skipped) > max_bad:
        last = "; ".join(f"{name}: {reason}" for name, reason in skipped[-3:])
        raise TooManyBadError(
            f"{len(skipped)} images cannot be used, more than --max_bad={max_bad}; the last: {last}"
        )


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Sums over the values of drawn latents, x = mean + std * noise, before scale and shift.

    A channel each, in float64.  The sums of two sets of images add up to those of both.
    """

    count: int = 0  # values a channel
    means: np.ndarray | float = 0.0  # of mean, [C]
    squares: np.ndarray | float = 0.0  # of mean^2
    variances: np.ndarray | float = 0.0  # of std^2

    def and_of(self, mean: np.ndarray, std: np.ndarray) -> "LatentStatistics":
        """These, and those of latents with moments [n,h,w,C]."""
        mean, std = (
            moment.reshape(-1, moment.shape[-1]).astype(np.float64) for moment in (mean, std)
        )
        return self.merged(
            LatentStatistics(len(mean), mean.sum(0), (mean**2).sum(0), (std**2).sum(0))
        )

    def merged(self, other: "LatentStatistics") -> "LatentStatistics":
        """Those of both sets of images."""
        return LatentStatistics(*map(operator.add, vars(self).values(), vars(other).values()))

    @property
    def stochastic(self) -> bool:
        """Whether any std is not zero."""
        return bool(np.any(self.variances))

    def summary(self) -> dict[str, list[float]]:
        """{"mean": [C], "std": [C]} of the drawn latents."""
        mean = self.means / self.count
        variance = (self.squares + self.variances) / self.count - mean**2
        return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist()}


@dataclasses.dataclass
class Part:
    """What has become of some images.

    Attributes:
        arrays: moments [n,h,w,C] and labels [n] by name, for each latent size.
        statistics: of the latents.
        skipped: the images that are not among them.
    """

    arrays: dict[Size, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    statistics: LatentStatistics = LatentStatistics()
    skipped: list[Skipped] = dataclasses.field(default_factory=list)


class Parts(ResumableFolder):
    """The parts of one job."""

    def __init__(self, job: Job):
        """Nothing is read or made before `begin`."""
        super().__init__(
            job.parts_folder,
            files=("part-*.npz",),
            content="latents",
            flag="--data_dir",
            error=DataError,
        )
        self._job = job

    def begin(self, images_per_part: int | None) -> None:
        """Begins the job, or goes on with it.

        Args:
            images_per_part: of a job that begins; None: see above.  One that goes on keeps its own.

        Raises:
            DataError: the folder holds parts that were made with other settings, or with unknown
                ones; or it cannot be written to.
        """
        check_is_for(self._job.data_dir, DATA, flag="--data_dir", error=DataError)
        num_images = len(self._job.images)
        if images_per_part is None:
            wanted = max(_MIN_IMAGES, math.ceil(num_images / _MAX_PARTS))
            images_per_part = max(1, min(wanted, _MAX_BYTES // self._job.image_bytes))
        record = {"images_per_part": images_per_part, "settings": self._job.settings}
        record = self.open(record, alone=False, ignore={"images_per_part"})
        self.images_per_part = record["images_per_part"]
        self.count = math.ceil(num_images / self.images_per_part)

    def images(self, part: int) -> range:
        """The images of a part, as places in the list."""
        first = part * self.images_per_part
        return range(first, min(first + self.images_per_part, len(self._job.images)))

    def missing(self) -> list[int]:
        """The parts that are not there."""
        return [part for part in range(self.count) if not (self.path / _name(part)).exists()]

    def check(self, parts: Iterable[int]) -> None:
        """Reads those of some parts that are there, and deletes damaged ones with a warning."""
        missing = self.missing()
        names = [_name(part) for part in parts if part not in missing]
        self.check_parts(names, lambda name, archive: _read_summary(archive))

    def write(self, part: int, content: Part) -> None:
        """Writes a part.  Where every std is zero they are left out."""
        statistics = content.statistics
        sums = {name: np.asarray(value).tolist() for name, value in vars(statistics).items()}
        summary = json.dumps({"skipped": content.skipped, "statistics": sums})
        members = {_SUMMARY: np.frombuffer(summary.encode(), np.uint8)}
        for size, named in content.arrays.items():
            for name, array in named.items():
                if statistics.stochastic or not name.startswith("std"):
                    members[_member(size, name)] = array
        self.write_part(_name(part), members)

    def summary(self, part: int) -> Part:
        """A part that is there, less the moments."""
        with self.open_part(_name(part)) as archive:
            return _read_summary(archive)

    def examples(self, size: Size, moments: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """All latents of one size, in the order of the list of images."""
        for part in range(self.count):
            arrays = {}
            with self.open_part(_name(part)) as archive:
                there = archive.namelist()
                for name in (*moments, "label"):
                    if f"{_member(size, name)}.npy" in there:
                        arrays[name] = read_array(archive, _member(size, name))
            if not arrays:
                continue
            left_out = dict.fromkeys(moments, np.zeros_like(arrays["mean"][0]))
            for row in range(len(arrays["label"])):
                yield left_out | {name: array[row] for name, array in arrays.items()}

    def remove(self) -> None:
        """Removes the job's parts, if there are any, and leaves those of another job.

        The record goes last: parts without it would be nobody's.
        """
        record = self.read_record()
        if record is None or differences(record.get("settings"), self._job.settings):
            return
        with contextlib.suppress(OSError):  # what remains is in nobody's way, and goes next time
            for path in self.path.iterdir():
                if path.name != RECORD_FILE:
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.path)


def _read_summary(archive: zipfile.ZipFile) -> Part:
    saved = json.loads(read_array(archive, _SUMMARY).tobytes())
    labels = [name for name in archive.namelist() if name.endswith("/label.npy")]
    arrays = {_size(name): {"label": read_array(archive, name[:-4])} for name in labels}
    sums = {name: np.asarray(value) for name, value in saved["statistics"].items()}
    skipped = [Skipped(*entry) for entry in saved["skipped"]]
    return Part(arrays, LatentStatistics(**sums), skipped)


def _name(part: int) -> str:
    return f"part-{part:05d}.npz"


def _member(size: Size, name: str) -> str:
    return f"{size[0]}x{size[1]}/{name}"


def _size(member: str) -> Size:
    height, width = member.partition("/")[0].split("x")
    return int(height), int(width)
