"""The batch stream: random access by step, read ahead by Grain's threads."""

import bisect
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from flowdcn_jax.data import randomness
from flowdcn_jax.data.prepared import DataError, Encoder
from flowdcn_jax.faults import retried

Batch = dict[str, np.ndarray]
"""{"image": [n,H,W,C], uint8 pixels or float32 latents; "label": int32 [n]}."""


# Positions are int64; a stream of this many batches ends after any run does.
_STREAM_BATCHES = 2**40
_CACHED_EPOCHS = 4  # a batch may straddle two epochs while a thread ahead needs the next


class DataSource(Protocol):
    """What `make_batches` needs of a data set, and what a training run may ask of it.

    Attributes:
        image_shape: (H, W, C) of one example.
        image_dtype: of `image` in a batch.
        num_classes: number of classes; labels are 0 .. num_classes - 1.
        class_names: their names in that order, or None where the data set holds none.
        encoder: what made the latents; None for pixels.
        identity: what tells the data set from others, in the types of JSON.
    """

    image_shape: tuple[int, int, int]
    image_dtype: np.dtype
    num_classes: int
    class_names: tuple[str, ...] | None
    encoder: Encoder | None
    identity: dict[str, Any]

    def __len__(self) -> int:
        """Number of examples in one epoch."""
        ...

    def read(self, indices: np.ndarray, positions: np.ndarray, seed: int) -> Batch:
        """Reads a batch; thread-safe.

        Args:
            indices: int64 [n], which examples (0 .. len - 1).
            positions: int64 [n], where each stands in the stream.  Together with `seed` it
                decides all that is random about the example.
            seed: integer in 0 .. 2**63 - 1.

        Returns:
            {"image": uint8 pixels 0 .. 255 or float32 latents, shifted and scaled, [n, H, W, C];
             "label": int32 [n]}.
        """
        ...


class BucketedSource:
    """Data sets of several shapes, of which each batch holds one.

    It has the attributes of `DataSource` that are the same in all of them; `identity` is that of
    all together, `buckets` are the data sets.
    """

    def __init__(self, buckets: Sequence[DataSource]):
        """`buckets`: at least one, with the same classes, none empty."""
        self.buckets = tuple(buckets)
        self.num_classes = buckets[0].num_classes
        self.class_names = buckets[0].class_names
        self.encoder = buckets[0].encoder
        self.identity = buckets[0].identity

    def __len__(self) -> int:
        """Number of examples in one epoch, of all buckets."""
        return sum(map(len, self.buckets))


def buckets_of(source: DataSource | BucketedSource) -> tuple[DataSource, ...]:
    """The data sets of one shape each that `source` consists of."""
    return source.buckets if isinstance(source, BucketedSource) else (source,)


def make_batches(
    source: DataSource | BucketedSource,
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
        process_index: this process, 0 .. process_count - 1.
        process_count: number of processes; divides batch_size.
        num_threads: threads that read batches ahead; 0 reads on the caller's thread.
        prefetch_batches: batches held ready, at least `num_threads` to occupy them all; 0 reads
            on the caller's thread.

    Returns:
        Iterator of {"image": [n, H, W, C], "label": int32 [n]}, n = batch_size / process_count;
        H and W are those of the step's bucket, in all processes the same.
        Its `close()` stops the threads.

    Raises:
        DataError: an argument is out of range, or a data set is empty.
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
    rows = batch_size // process_count
    read = _batch_reader(
        buckets_of(source),
        batch_size=batch_size,
        seed=seed,
        first_row=process_index * rows,
        rows=rows,
    )
    # Grain warns about threads that a shorter buffer would leave idle; do not start them.
    options = grain.ReadOptions(
        num_threads=min(num_threads, prefetch_batches), prefetch_buffer_size=prefetch_batches
    )
    steps = grain.MapDataset.range(start_step, start_step + _STREAM_BATCHES)
    return iter(steps.map(read).to_iter_dataset(options))


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise DataError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _batch_reader(
    buckets: Sequence[DataSource], *, batch_size: int, seed: int, first_row: int, rows: int
) -> Callable[[int], Batch]:
    """A function from a step to `rows` rows of its batch, from `first_row` on; thread-safe."""
    sizes = [len(bucket) for bucket in buckets]
    schedule = BucketSchedule(sizes, batch_size=batch_size, seed=seed)
    firsts = [0, *itertools.accumulate(sizes)][:-1]
    orders = [
        ShuffledOrder(size, seed=seed, first=first)
        for size, first in zip(sizes, firsts, strict=True)
    ]

    def read(step: int) -> Batch:
        number, batch = schedule(step)
        bucket = buckets[number]
        first = batch * batch_size + first_row
        visits = np.arange(first, first + rows, dtype=np.int64)  # to this bucket
        # No two visits, of any bucket, have the same position.  With one bucket they are equal.
        epochs, places = np.divmod(visits, len(bucket))
        positions = epochs * sum(sizes) + firsts[number] + places
        return retried(lambda: bucket.read(orders[number](visits), positions, seed), what="data")

    return read


def _of_epochs(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """`make` of an epoch, thread-safe, with the results of the last few epochs kept."""
    lock = threading.Lock()
    cached = functools.lru_cache(_CACHED_EPOCHS)(make)

    def get(epoch: int) -> Any:
        with lock:  # at a new epoch one thread sorts, the others wait for it
            return cached(epoch)

    return get


class ShuffledOrder:
    """The index of the example at each position: a new permutation every epoch.

    Thread-safe.  Keeps the permutations of the last few epochs (8 bytes an example each).
    """

    def __init__(self, size: int, *, seed: int, first: int = 0):
        """Orders `size` examples, after `first` of other orders of this seed.

        So no two parts that one seed shuffles are shuffled alike.
        """
        self._size = size
        self._seed = seed
        self._first = first
        self._permutation = _of_epochs(self._shuffle)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n] positions >= 0 in the stream -> int64 [n] indices of examples."""
        epochs, offsets = np.divmod(positions, self._size)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            indices[rows] = self._permutation(int(epoch))[offsets[rows]]
        return indices

    def _shuffle(self, epoch: int) -> np.ndarray:
        examples = np.arange(self._first, self._first + self._size)
        words = randomness.hash64(
            examples, seed=self._seed, purpose=randomness.SHUFFLE, epoch=epoch
        )
        return np.argsort(words, kind="stable")


class BucketSchedule:
    """Mixes batches of several buckets in proportion to their images, in an order by the seed.

    An epoch is as many steps as all images fill batches.  Before epoch e, bucket b has given
    floor(e * size_b / batch_size) batches, so that at its start no bucket is a whole batch behind
    its share.  Within an epoch the batches are shuffled.

    Thread-safe.  A step costs the same whatever its number.
    """

    def __init__(self, sizes: Sequence[int], *, batch_size: int, seed: int):
        """`sizes`: examples in each bucket, >= 1."""
        self._sizes = [int(size) for size in sizes]
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = _of_epochs(self._shuffle)

    def __call__(self, step: int) -> tuple[int, int]:
        """(bucket, batch): the step's batch is the bucket's number `batch`, both from 0."""
        # In the epochs before `enough` there are more than `step` batches.
        enough = (step + len(self._sizes) + 1) * self._batch_size // sum(self._sizes) + 2
        epoch = bisect.bisect_right(range(enough), step, key=self._steps_before) - 1
        buckets, ranks = self._epoch(epoch)
        place = step - self._steps_before(epoch)
        bucket = int(buckets[place])
        return bucket, self._batches_before(bucket, epoch) + int(ranks[place])

    def _batches_before(self, bucket: int, epoch: int) -> int:
        return epoch * self._sizes[bucket] // self._batch_size

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * size // self._batch_size for size in self._sizes)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each of the epoch's steps, and how many of its batches came before."""
        counts = [
            self._batches_before(bucket, epoch + 1) - self._batches_before(bucket, epoch)
            for bucket in range(len(self._sizes))
        ]
        words = randomness.hash64(
            np.arange(sum(counts)), seed=self._seed, purpose=randomness.SCHEDULE, epoch=epoch
        )
        buckets = np.repeat(np.arange(len(counts)), counts)[np.argsort(words, kind="stable")]
        ranks = np.empty_like(buckets)
        for bucket, count in enumerate(counts):
            ranks[buckets == bucket] = np.arange(count)
        return buckets, ranks
