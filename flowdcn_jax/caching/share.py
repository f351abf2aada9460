"""One process's share of a job: the parts that are missing are encoded, then all are joined."""

import contextlib
import itertools
import shutil
from typing import Any

import numpy as np
from tqdm import tqdm

from flowdcn_jax.caching.encoding import LatentEncoder, encode_part, read_ahead
from flowdcn_jax.caching.job import Job
from flowdcn_jax.caching.joining import finished_manifest, join
from flowdcn_jax.caching.parts import Parts, check_bad
from flowdcn_jax.data import DataError


def cache_latents(
    job: Job,
    *,
    batch_size: int | None,
    num_threads: int,
    max_bad: int,
    shard_index: int,
    num_shards: int,
    images_per_part: int | None = None,
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
        images_per_part: what a stop can lose, if the job begins; None: by their number and size.

    Returns:
        The manifest, or None while other processes' shares are missing.

    Raises:
        DataExistsError: other latents are in the way.
        TooManyBadError: more than `max_bad` images cannot be used.
        DataError: the beginning of other latents is in the way; no image can be used, a label is
            out of range, or the autoencoder gives values that float16 cannot hold; the disk is too
            small; a disk or a network fails, or the memory does not suffice.
    """
    parts, manifest = Parts(job), finished_manifest(job)
    if manifest is not None:
        parts.remove()  # of a join that was killed at its very end
        return manifest
    parts.begin(images_per_part)
    mine = range(shard_index, parts.count, num_shards)
    parts.check(mine)
    missing = [part for part in parts.missing() if part in mine]
    written = [part for part in mine if part not in missing]
    skipped = [entry for part in written for entry in parts.summary(part).skipped]
    check_bad(skipped, max_bad)
    _check_space(job, parts)
    if missing:
        encoder = LatentEncoder(job.autoencoder, mirrored=job.mirrored, batch_size=batch_size)
        stream = read_ahead(
            job,
            np.concatenate([parts.images(part) for part in missing]),
            num_threads=num_threads,
            ahead=2 * max(encoder.rows(*size) for size in job.image_sizes),
        )
        total, initial = (sum(len(parts.images(p)) for p in some) for some in (mine, written))
        bar = tqdm(desc="encoding", total=total, initial=initial, unit="img", dynamic_ncols=True)
        with contextlib.closing(stream), bar:
            for part in missing:
                images = itertools.islice(stream, len(parts.images(part)))
                options = dict(skipped=skipped, max_bad=max_bad, progress=bar)
                parts.write(part, encode_part(images, encoder, **options))
                if part == missing[0]:
                    _check_space(job, parts)
    return join(job, parts, max_bad=max_bad, alone=num_shards == 1)


def _check_space(job: Job, parts: Parts) -> None:
    """Checks that the missing parts and the data sets fit, beside the parts that are there.

    Until a part is there nobody knows whether the autoencoder has standard deviations: then half
    may pass that is needed.

    Raises:
        DataError: they do not fit; the message says how much is needed and is there.
    """
    missing = parts.missing()
    written = next((part for part in range(parts.count) if part not in missing), None)
    stochastic = written is not None and parts.summary(written).statistics.stochastic
    image_bytes = job.image_bytes if stochastic else job.image_bytes // 2
    to_encode = sum(len(parts.images(part)) for part in missing)
    joined_bytes = sum(
        path.stat().st_size for size in job.latent_sizes for path in job.folder(size).rglob("*")
    )
    to_join_bytes = max(0, len(job.images) * image_bytes - joined_bytes)
    needed_bytes = to_encode * image_bytes + to_join_bytes
    free_bytes = shutil.disk_usage(parts.path).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"{job.data_dir} needs about {_gigabytes(needed_bytes)} more, for parts and the data "
            f"set that they are joined to, and {_gigabytes(free_bytes)} are free there: make room, "
            "or name another --data_dir"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
