"""Cached latents of random numbers, written and read as real ones are, and their reader's rate."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowdcn_jax.data import make_batches, write_latents
from flowdcn_jax.data.latents import moment_names

_MOMENTS = moment_names(stochastic=True, mirrored=True)
_ENCODER = {"name": "random", "weights_sha256": None, "scale": 0.18215, "shift": 0.0}


class ReaderRate(NamedTuple):
    """How fast batches come when nothing else is done."""

    examples_per_s: float
    cpu_us_per_example: float


def write_random_latents(folder: Path, *, shape: tuple[int, int, int], megabytes: int) -> None:
    """Writes latents of a shape (h, w, c) and their mirror images, `megabytes` of them."""
    count = max(1, megabytes * 2**20 // (len(_MOMENTS) * 2 * int(np.prod(shape))))

    def examples() -> Iterator[dict[str, Any]]:
        generator = np.random.default_rng(0)
        for index in range(count):
            moments = np.abs(generator.standard_normal((len(_MOMENTS), *shape), np.float32))
            yield dict(zip(_MOMENTS, moments, strict=True)) | {"label": index % 1000}

    write_latents(
        examples(),
        data_dir=folder,
        latent_shape=shape,
        num_classes=1000,
        num_examples=count,
        metadata={"settings": {"autoencoder": _ENCODER}},
    )


def reader_rate(
    source: Any,
    *,
    batch_size: int,
    num_threads: int,
    prefetch_batches: int,
    seconds: float,
    seed: int,
) -> ReaderRate:
    """The rate of one run of `seconds`, in which batches are thrown away as they come."""
    batches = make_batches(
        source,
        batch_size=batch_size,
        seed=seed,
        num_threads=num_threads,
        prefetch_batches=prefetch_batches,
    )
    for _ in range(2 * prefetch_batches):  # the first are read ahead while nobody waits
        next(batches)
    count, start_s, start_cpu_s = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start_s < seconds:
        next(batches)
        count += batch_size
    elapsed_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    batches.close()
    return ReaderRate(count / elapsed_s, 1e6 * cpu_s / count)
