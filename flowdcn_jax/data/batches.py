"""The batch stream: random access by step, read ahead by Grain's threads."""

import itertools
from collections.abc import Iterator

import grain
import numpy as np

from flowdcn_jax.data import randomness
from flowdcn_jax.data.bucket_schedule import BucketSchedule
from flowdcn_jax.data.errors import DataError
from flowdcn_jax.data.sources import Batch, BucketedSource, Source, buckets_of

# Positions are int64; a stream of this many batches ends after any run does.
_STREAM_BATCHES = 2**40


class BatchSource:
    """Random access to one process's rows of the global batches of a stream.

    Item b is the batch of step `start_step + b`: rows
    `process_index * B/P .. (process_index + 1) * B/P` of the global batch, so that the local
    batches of all P processes, one after the other, are the global batch whatever P is.
    """

    def __init__(
        self,
        source: Source | BucketedSource,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        process_index: int,
        process_count: int,
    ):
        self._buckets = buckets_of(source)
        self._seed = seed
        self._batch_size = batch_size
        self._start_step = start_step
        self._rows = batch_size // process_count
        self._first_row = process_index * self._rows
        sizes = [len(bucket) for bucket in self._buckets]
        self._epoch_size = sum(sizes)
        self._schedule = BucketSchedule(sizes, batch_size=batch_size, seed=seed)
        self._firsts = [0, *itertools.accumulate(sizes)][:-1]
        self._orders = [
            randomness.ShuffledOrder(size, seed=seed, first=first)
            for size, first in zip(sizes, self._firsts, strict=True)
        ]

    def __len__(self) -> int:
        return _STREAM_BATCHES

    def __getitem__(self, index: int) -> Batch:
        number, batch = self._schedule(self._start_step + int(index))
        bucket = self._buckets[number]
        first = batch * self._batch_size + self._first_row
        visits = np.arange(first, first + self._rows, dtype=np.int64)  # to this bucket
        # No two visits, of any bucket, have the same position.  With one bucket they are equal.
        epochs, places = np.divmod(visits, len(bucket))
        positions = epochs * self._epoch_size + self._firsts[number] + places
        return bucket.read(self._orders[number](visits), positions, self._seed)


def make_batches(
    source: Source | BucketedSource,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int,
    prefetch_batches: int,
) -> Iterator[Batch]:
    """An endless iterator of shuffled local batches, the same however it is read.

    Each epoch visits every example once in a new order; a batch may straddle two epochs.  The
    batches depend on `source`, `batch_size`, `seed` and the step alone: a run resumes by passing
    its step as `start_step`.  The number of processes may change in mid-run, and every position
    of the stream stays the same example with the same noise when the batch size changes.

    The batches of a `BucketedSource` hold one bucket each, mixed as `BucketSchedule` says; each
    bucket's examples have epochs of their own.

    Args:
        source: the data set, from `make_source`.
        batch_size: examples a step over all processes.
        seed: integer in 0 .. 2**63 - 1.
        start_step: the step of the first batch, >= 0.
        process_index: this process, 0 .. process_count - 1 (`jax.process_index()`).
        process_count: number of processes (`jax.process_count()`).
        num_threads: threads that read batches ahead; 0 reads on the caller's thread.
        prefetch_batches: batches held ready, at least `num_threads` to occupy them all; 0 reads
            on the caller's thread.

    Returns:
        Iterator of {"image": [n, H, W, C], "label": int32 [n]}, n = batch_size / process_count;
        H and W are those of the step's bucket, in all processes the same.
        Its `close()` stops the threads.

    Raises:
        DataError: an argument is out of range, or `process_count` does not divide
            `batch_size`.
    """
    _require_at_least("batch_size", batch_size, 1)
    _require_at_least("process_count", process_count, 1)
    _require_at_least("seed", seed, 0)
    _require_at_least("start_step", start_step, 0)
    _require_at_least("num_threads", num_threads, 0)
    _require_at_least("prefetch_batches", prefetch_batches, 0)
    if seed > randomness.MAX_SEED:
        raise DataError(f"seed must be at most 2**63 - 1, got {seed}")
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index must be 0 .. {process_count - 1}, got {process_index}")
    if batch_size % process_count:
        raise DataError(
            f"batch_size={batch_size} is not divisible by the number of processes, {process_count}"
        )
    if not all(map(len, buckets_of(source))):
        raise DataError("the data set, or a bucket of it, holds no examples")
    batches = BatchSource(
        source,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
    )
    # Grain warns about threads that a shorter buffer would leave idle; do not start them.
    options = grain.ReadOptions(
        num_threads=min(num_threads, prefetch_batches), prefetch_buffer_size=prefetch_batches
    )
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise DataError(f"{name} must be an integer of at least {minimum}, got {value!r}")
