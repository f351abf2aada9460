"""Which bucket the batch of each step comes from."""

import bisect
import functools
import threading
from collections.abc import Sequence

import numpy as np

from flowdcn_jax.data import randomness

_CACHED_EPOCHS = 4  # threads that read ahead may need the next epoch's


class BucketSchedule:
    """Mixes batches of several buckets in proportion to their images, in an order by the seed.

    An epoch is as many steps as all images fill batches.  Before epoch e, bucket b has given
    floor(e * size_b / batch_size) batches, so that at its start no bucket is a whole batch behind
    its share.  Within an epoch the batches are shuffled.

    Thread-safe.  A step costs the same whatever its number.
    """

    def __init__(self, sizes: Sequence[int], *, batch_size: int, seed: int):
        """Plans the batches.

        Args:
            sizes: examples in each bucket, >= 1.
            batch_size: examples a step.
            seed: integer in 0 .. 2**63 - 1.
        """
        self._sizes = [int(size) for size in sizes]
        self._batch_size = batch_size
        self._seed = seed
        self._lock = threading.Lock()
        self._cached_epoch = functools.lru_cache(_CACHED_EPOCHS)(self._epoch)

    def __call__(self, step: int) -> tuple[int, int]:
        """(bucket, batch): the step's batch is the bucket's number `batch`, both from 0."""
        # In the epochs before `enough` there are more than `step` batches.
        enough = (step + len(self._sizes) + 1) * self._batch_size // sum(self._sizes) + 2
        epoch = bisect.bisect_right(range(enough), step, key=self._steps_before) - 1
        with self._lock:
            buckets, ranks = self._cached_epoch(epoch)
        place = step - self._steps_before(epoch)
        bucket = int(buckets[place])
        return bucket, self._batches_before(bucket, epoch) + int(ranks[place])

    def _batches_before(self, bucket: int, epoch: int) -> int:
        return epoch * self._sizes[bucket] // self._batch_size

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * size // self._batch_size for size in self._sizes)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
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
