"""Whether the disk can take what a job has yet to write."""

import shutil

from flowdcn_jax.caching.job import Job
from flowdcn_jax.caching.parts import Parts
from flowdcn_jax.data import DataError


def check_space(job: Job, parts: Parts) -> None:
    """Checks that the missing parts and the data sets fit, beside the parts that are there.

    Until a part is there nobody knows whether the autoencoder has standard deviations: then half
    may pass that is needed.

    Raises:
        DataError: they do not fit; the message says how much is needed and is there.
    """
    missing = set(parts.missing())
    written = [part for part in range(parts.count) if part not in missing]
    stochastic = bool(written) and parts.summary(written[0]).statistics.stochastic
    image_bytes = job.image_bytes if stochastic else job.image_bytes // 2
    to_encode = sum(len(parts.images(part)) for part in missing)
    joined_bytes = sum(
        path.stat().st_size for size in job.latent_sizes for path in job.folder(size).rglob("*")
    )
    to_join_bytes = max(0, len(job.images) * image_bytes - joined_bytes)
    needed_bytes = to_encode * image_bytes + to_join_bytes
    free_bytes = shutil.disk_usage(parts.folder).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"{job.data_dir} needs about {_gigabytes(needed_bytes)} more, for parts and the data "
            f"set that they are joined to, and {_gigabytes(free_bytes)} are free there: make room, "
            "or name another --data_dir"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
