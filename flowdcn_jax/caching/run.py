"""Caching, stage by stage: list, encode what is missing, join."""

import collections
import contextlib
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from flowdcn_jax.caching.encoding import LatentEncoder, read_ahead
from flowdcn_jax.caching.job import Job, Size
from flowdcn_jax.caching.joining import finished_manifest, join
from flowdcn_jax.caching.parts import Parts, Skipped, check_bad, remove_parts
from flowdcn_jax.caching.space import check_space
from flowdcn_jax.caching.statistics import LatentStatistics
from flowdcn_jax.data import DataError, randomness
from flowdcn_jax.data.image_files import BadImageError, centre_crop, random_crop

_BATCHES_IN_FLIGHT = 2  # so that the devices never wait for the host
_CROP_SEED = 0


class Cropped(NamedTuple):
    """An image, ready to be encoded."""

    name: str
    pixels: np.ndarray  # uint8 [H, W, 3]
    label: int


def cache_latents(
    job: Job,
    *,
    batch_size: int | None,
    num_threads: int,
    max_bad: int,
    shard_index: int,
    num_shards: int,
) -> dict[str, Any] | None:
    """Encodes this process's share of a job, and joins all shares once the last one is there.

    Stopped at any moment, the same call goes on; what is cached already is left alone.

    Args:
        job: what to cache.
        batch_size: images a device; None: by their size.
        num_threads: threads that decode images.
        max_bad: images that may be skipped.
        shard_index: this process's share, 0 .. num_shards - 1.
        num_shards: processes that work on the job, in one `data_dir`.

    Returns:
        The manifest, or None while other processes' shares are missing.

    Raises:
        DataExistsError: other latents, or the beginning of some, are in the way.
        TooManyBadError: more than `max_bad` images cannot be used.
        DataError: no image can be used, a label is out of range, or the autoencoder gives values
            that float16 cannot hold; the disk is too small; a disk or a network fails, or the
            memory does not suffice.
    """
    manifest = finished_manifest(job)
    if manifest is not None:
        remove_parts(job.parts_folder, job.settings)  # of a join that was killed at its very end
        return manifest
    parts = Parts(
        job.parts_folder,
        job.settings,
        num_images=len(job.images),
        image_bytes=job.image_bytes,
    )
    mine = range(shard_index, parts.count, num_shards)
    missing = [part for part in parts.missing() if part in mine]
    written = [part for part in mine if part not in missing]
    skipped = [entry for part in written for entry in parts.summary(part).skipped]
    check_bad(skipped, max_bad)
    check_space(job, parts)
    if missing:
        encoder = LatentEncoder(job.autoencoder, mirrored=job.mirrored, batch_size=batch_size)
        ahead = 2 * max(encoder.rows(*size) for size in job.image_sizes)
        indices = itertools.chain.from_iterable(parts.images(part) for part in missing)
        read = functools.partial(_read, job)
        with (
            contextlib.closing(
                read_ahead(read, indices, num_threads=num_threads, ahead=ahead)
            ) as stream,
            _progress(parts, mine, written) as progress,
        ):
            for part in missing:
                images = itertools.islice(stream, len(parts.images(part)))
                content = _encode_part(images, encoder, skipped, max_bad, progress)
                parts.write(part, *content)
                if part == missing[0]:
                    check_space(job, parts)
    return join(job, parts, max_bad=max_bad, alone=num_shards == 1)


def _progress(parts: Parts, mine: Iterable[int], written: Iterable[int]) -> tqdm:
    total, initial = (sum(len(parts.images(part)) for part in some) for some in (mine, written))
    return tqdm(desc="encoding", total=total, initial=initial, unit="img", dynamic_ncols=True)


def _read(job: Job, index: int) -> Cropped | Skipped:
    """Image `index`, cropped.  The crop for a bucket belongs to the image, whoever makes it."""
    name = job.images.name(index)
    try:
        image, label = job.images.read(index)
        if job.buckets is None:
            pixels = centre_crop(image, job.image_size)
        else:
            height, width = job.buckets.nearest(image.height, image.width)
            place = randomness.uniform(np.array([index]), seed=_CROP_SEED, purpose=randomness.CROP)
            pixels = random_crop(image, height, width, place=float(place[0]))
    except BadImageError as error:
        return Skipped(name, str(error))
    except (MemoryError, OSError) as error:
        reason = str(error) or "out of memory"
        raise DataError(
            f"{name} could not be read now ({reason}): once that is mended, the same command "
            "goes on"
        ) from error
    if not 0 <= label < job.images.num_classes:
        raise DataError(f"{name} has the label {label}; expected 0 .. {job.images.num_classes - 1}")
    return Cropped(name, pixels, label)


def _encode_part(
    images: Iterator[Cropped | Skipped],
    encoder: LatentEncoder,
    skipped: list[Skipped],
    max_bad: int,
    progress: tqdm,
) -> tuple[dict[Size, dict[str, np.ndarray]], list[Skipped], LatentStatistics]:
    """Arrays a latent size, skipped images and statistics, as `Parts.write` takes them.

    `skipped` is added to; it may hold images of other parts.
    """
    first_skipped = len(skipped)
    batches = _Batches(encoder, progress)
    for image in images:
        if isinstance(image, Skipped):
            progress.update()
            skipped.append(image)
            progress.write(f"skipped {image.name}: {image.reason}", file=sys.stderr)
            check_bad(skipped, max_bad)
        else:
            batches.add(image)
    arrays, statistics = batches.finish()
    return arrays, skipped[first_skipped:], statistics


class _Batches:
    """Collects images of one size each into batches, and the batches' latents."""

    def __init__(self, encoder: LatentEncoder, progress: tqdm):
        self._encoder = encoder
        self._progress = progress
        self._waiting: dict[Size, list[Cropped]] = collections.defaultdict(list)
        self._in_flight: collections.deque = collections.deque()
        self._done: dict[Size, list[dict[str, np.ndarray]]] = collections.defaultdict(list)
        self._statistics = LatentStatistics()

    def add(self, image: Cropped) -> None:
        size = image.pixels.shape[:2]
        self._waiting[size].append(image)
        if len(self._waiting[size]) == self._encoder.rows(*size):
            self._start(size)

    def finish(self) -> tuple[dict[Size, dict[str, np.ndarray]], LatentStatistics]:
        """The arrays of each latent size, and the statistics of all."""
        for size in list(self._waiting):
            self._start(size)
        while self._in_flight:
            self._fetch()
        arrays = {
            size: {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
            for size, batches in self._done.items()
        }
        return arrays, self._statistics

    def _start(self, size: Size) -> None:
        images = self._waiting.pop(size)
        self._in_flight.append((images, self._encoder.start([image.pixels for image in images])))
        if len(self._in_flight) > _BATCHES_IN_FLIGHT:
            self._fetch()

    def _fetch(self) -> None:
        images, fetch = self._in_flight.popleft()
        moments = fetch()
        finite = np.all([np.isfinite(array).all((1, 2, 3)) for array in moments.values()], axis=0)
        if not finite.all():
            raise DataError(
                f"{images[finite.argmin()].name}: the autoencoder gives values that float16 cannot "
                "hold; with --autoencoder_dtype=float32 it may not"
            )
        for mean in [name for name in moments if name.startswith("mean")]:
            self._statistics.add(moments[mean], moments[mean.replace("mean", "std")])
        labels = np.array([image.label for image in images], np.int32)
        self._done[moments["mean"].shape[1:3]].append(moments | {"label": labels})
        self._progress.update(len(images))
