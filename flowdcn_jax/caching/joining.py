"""From the finished parts of a job to the TFDS data set `imagenet_latents`."""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

from flowdcn_jax.caching.job import Job, Size
from flowdcn_jax.caching.parts import LatentStatistics, Parts, check_bad
from flowdcn_jax.data import DataError, DataExistsError, write_latents
from flowdcn_jax.data.latents import ImagenetLatents, moment_names
from flowdcn_jax.data.prepared import newest_version, read_manifest
from flowdcn_jax.runs.folder import differences, lock

# Without a change for so long, a join has ended; while it runs it begins a file every few seconds.
_JOIN_ENDED_S = 3600


def finished_manifest(job: Job) -> dict[str, Any] | None:
    """The manifest of the job's latents if all its data sets are there, else None.

    Raises:
        DataExistsError: other latents are in their place.
    """
    found = {}
    for size in job.latent_sizes:
        folder = newest_version(job.folder(size))
        if folder is None:
            continue
        manifest = read_manifest(folder)
        how = differences(manifest["settings"], job.settings) if manifest else ["no manifest"]
        if how:
            raise DataExistsError(
                f"{folder} holds other latents ({'; '.join(how)}): name another --data_dir, one "
                "for each split and set of options"
            )
        found[job.config_name(size)] = manifest
    manifest = next(iter(found.values()), None)
    complete = manifest is not None and manifest["num_examples"].keys() <= found.keys()
    return manifest if complete else None


def join(job: Job, parts: Parts, *, max_bad: int, alone: bool) -> dict[str, Any] | None:
    """Writes the job's data sets if all parts are there, and then removes the parts.

    Each data set takes its place as a whole, with the manifest.  Of several processes one joins,
    the others wait for it.  On network file systems without locks, or with locks that hold on one
    host alone, several may join at once: then the data set counts that is the first to be whole.

    Args:
        job: what is cached.
        parts: its parts.
        max_bad: images that may be skipped.
        alone: no other host works on the job.

    Returns:
        The manifest, or None if parts are missing.

    Raises:
        DataError: not one image could be used.
        TooManyBadError: more than `max_bad` images were skipped, over all parts.
    """
    folder = job.data_dir / ImagenetLatents.name
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, error=DataError, wait=True):
        while (manifest := finished_manifest(job)) is None:
            if parts.missing():
                return None
            before = _sizes_to_write(job)
            try:
                _write(job, parts, max_bad=max_bad, alone=alone)
            except (DataError, OSError):  # if another host was faster, all that it has done
                if _sizes_to_write(job) == before:
                    raise
        parts.remove()
    return manifest


def _sizes_to_write(job: Job) -> list[Size]:
    return [size for size in job.latent_sizes if newest_version(job.folder(size)) is None]


def _write(job: Job, parts: Parts, *, max_bad: int, alone: bool) -> None:
    statistics, counts, skipped = LatentStatistics(), dict.fromkeys(job.latent_sizes, 0), []
    for part in range(parts.count):
        summary = parts.summary(part)
        statistics = statistics.merged(summary.statistics)
        skipped += summary.skipped
        for size, named in summary.arrays.items():
            counts[size] += len(named["label"])
    check_bad(skipped, max_bad)
    counts = {size: count for size, count in counts.items() if count}
    if not counts:
        raise DataError(f"not one image of {job.dataset} could be used; first: {skipped[0]}")
    manifest = {
        "settings": job.settings,
        "num_examples": {job.config_name(size): count for size, count in counts.items()},
        "statistics": statistics.summary(),
        "skipped": [entry._asdict() for entry in skipped],
        "notes": list(job.images.notes),
    }
    names = moment_names(stochastic=statistics.stochastic, mirrored=job.mirrored)
    for size in _sizes_to_write(job):
        if size not in counts:
            continue
        _remove_remains(job.folder(size), unchanged_s=0 if alone else _JOIN_ENDED_S)
        write_latents(
            parts.examples(size, names),
            data_dir=job.data_dir,
            latent_shape=job.latent_shape(size),
            num_classes=job.images.num_classes,
            class_names=job.images.class_names,
            num_examples=counts[size],
            split=job.written_split,
            stochastic=statistics.stochastic,
            mirrored=job.mirrored,
            config_name=job.config_name(size),
            metadata=manifest,
        )
        _remove_remains(job.folder(size), unchanged_s=0)


def _remove_remains(folder: Path, *, unchanged_s: float) -> None:
    """Removes what joins that were killed have left, if it has not changed for so many seconds."""
    for remains in folder.glob("incomplete.*"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            changed_s = max(path.stat().st_mtime for path in (remains, *remains.iterdir()))
            if time.time() - changed_s >= unchanged_s:
                shutil.rmtree(remains)
