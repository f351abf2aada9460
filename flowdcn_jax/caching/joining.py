"""From the finished parts of a job to the TFDS data set `imagenet_latents`."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowdcn_jax.caching.job import Job
from flowdcn_jax.caching.parts import Parts, check_bad, difference
from flowdcn_jax.caching.statistics import LatentStatistics
from flowdcn_jax.data import DataError, DataExistsError, write_latents
from flowdcn_jax.data.builders import ImagenetLatents
from flowdcn_jax.data.prepared import newest_version, read_manifest
from flowdcn_jax.data.sources import moment_names


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
        if manifest is None or manifest["settings"] != job.settings:
            how = difference(manifest["settings"], job.settings) if manifest else "no manifest"
            raise DataExistsError(
                f"{folder} holds other latents ({how}): remove it, or name another --data_dir"
            )
        found[job.config_name(size)] = manifest
    manifest = next(iter(found.values()), None)
    complete = manifest is not None and manifest["num_examples"].keys() <= found.keys()
    return manifest if complete else None


def join(job: Job, parts: Parts, *, max_bad: int) -> dict[str, Any] | None:
    """Writes the job's data sets if all parts are there, and then removes the parts.

    Each data set takes its place as a whole, with the manifest.  Of several processes one joins,
    the others wait for it.

    Returns:
        The manifest, or None if parts are missing.

    Raises:
        DataError: not one image could be used.
        TooManyBadError: more than `max_bad` images were skipped, over all parts.
    """
    with _lock(job.data_dir / ImagenetLatents.name):
        manifest = finished_manifest(job)
        if manifest is None:
            if parts.missing():
                return None
            manifest = _write(job, parts, max_bad=max_bad)
        shutil.rmtree(parts.folder, ignore_errors=True)
    return manifest


def _write(job: Job, parts: Parts, *, max_bad: int) -> dict[str, Any]:
    statistics, counts, skipped = LatentStatistics(), dict.fromkeys(job.latent_sizes, 0), []
    for part in range(parts.count):
        summary = parts.summary(part)
        statistics.merge(summary.statistics)
        skipped += summary.skipped
        for size, count in summary.counts.items():
            counts[size] += count
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
    for size, count in counts.items():
        if newest_version(job.folder(size)):
            continue
        for remains in job.folder(size).glob("incomplete.*"):  # of a join that was killed
            shutil.rmtree(remains)
        write_latents(
            parts.examples(size, names),
            data_dir=job.data_dir,
            latent_shape=job.latent_shape(size),
            num_classes=job.images.num_classes,
            class_names=job.images.class_names,
            num_examples=count,
            split=job.written_split,
            stochastic=statistics.stochastic,
            mirrored=job.mirrored,
            config_name=job.config_name(size),
            metadata=manifest,
        )
    return manifest


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time; the system lets go of it when the process ends, however it does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
