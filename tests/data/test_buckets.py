"""The stream over aspect buckets: one shape a batch, in proportion, and from the step alone."""

import collections
import itertools

import numpy as np
import pytest

from flowdcn_jax.data import BucketedSource, DataError, make_batches, randomness
from flowdcn_jax.data.batches import BucketSchedule


class Bucket:
    """Returns the index as the label, and the position and one random number as the image."""

    num_classes = 1000
    class_names = None
    encoder = None

    def __init__(self, size, width):
        self._size = size
        self.image_shape = (1, width, 1)
        self.identity = {"size": size}

    def __len__(self):
        return self._size

    def read(self, indices, positions, seed):
        image = np.empty((len(indices), *self.image_shape), np.float32)
        randomness.fill_standard_normal(image, positions, seed=seed)
        return {"image": image, "label": indices.astype(np.int32), "position": positions}


SIZES = (50, 7, 1, 23)
TOTAL = sum(SIZES)
BATCH = 8


def take(count, *, sizes=SIZES, **options):
    """`count` batches; the bucket of each is told by its width, from 1."""
    source = BucketedSource([Bucket(size, width) for width, size in enumerate(sizes, start=1)])
    defaults = {"batch_size": BATCH, "seed": 3, "num_threads": 0, "prefetch_batches": 0}
    return list(itertools.islice(make_batches(source, **(defaults | options)), count))


def bucket_of(batch):
    return batch["image"].shape[2] - 1


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(batch[name], other[name])


def test_one_bucket_gives_the_stream_of_its_data_set():
    def options():
        return {"batch_size": BATCH, "seed": 3, "num_threads": 0, "prefetch_batches": 0}

    plain = itertools.islice(make_batches(Bucket(50, 1), **options()), 40)
    assert_same(take(40, sizes=(50,)), list(plain))


def test_buckets_are_mixed_in_proportion_to_their_images():
    batches = collections.Counter(map(bucket_of, take(TOTAL * 3)))  # 24 epochs
    assert [batches[bucket] for bucket in range(4)] == [3 * size for size in SIZES]


def test_at_each_epochs_start_every_bucket_has_given_its_share():
    buckets = list(map(bucket_of, take(TOTAL)))
    steps = 0
    for epoch in range(1, BATCH + 1):
        shares = [epoch * size // BATCH for size in SIZES]
        steps = sum(shares)
        assert [buckets[:steps].count(bucket) for bucket in range(4)] == shares
    assert steps == TOTAL


def test_the_order_of_buckets_is_shuffled_and_belongs_to_the_seed():
    orders = [tuple(map(bucket_of, take(TOTAL, seed=seed))) for seed in (3, 4)]
    assert orders[0] != orders[1] and list(orders[0]) != sorted(orders[0])
    equal = list(map(bucket_of, take(60, sizes=(16, 16, 16))))  # six batches an epoch, two of each
    epochs = {tuple(equal[start : start + 6]) for start in range(0, 60, 6)}
    assert len(epochs) > 4 and all(sorted(epoch) == [0, 0, 1, 1, 2, 2] for epoch in epochs)


def test_each_bucket_visits_every_example_once_an_epoch():
    visited = collections.defaultdict(list)
    for batch in take(3 * TOTAL):
        visited[bucket_of(batch)].extend(batch["label"].tolist())
    for bucket, size in enumerate(SIZES):
        epochs = np.array(visited[bucket]).reshape(-1, size)
        np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(size), (len(epochs), 1)))
        if size > 20:
            assert len(np.unique(epochs, axis=0)) == len(epochs)


def test_buckets_of_one_size_are_not_shuffled_alike():
    batches = take(20, sizes=(8, 8))
    labels = [[b["label"].tolist() for b in batches if bucket_of(b) == bucket] for bucket in (0, 1)]
    assert all(one != other for one, other in zip(*labels, strict=False))


def test_no_two_visits_share_their_noise():
    positions = np.concatenate([batch["position"] for batch in take(3 * TOTAL)])
    assert len(np.unique(positions)) == len(positions)


def test_the_stream_does_not_change_so_that_old_runs_resume():
    assert list(map(bucket_of, take(16))) == [0, 3, 0, 0, 0, 3, 0, 0, 0, 3, 0, 3, 0, 1, 0, 0]
    pinned = {  # bucket, labels, first position
        13: (1, [5, 2, 0, 4, 3, 6, 1, 0], 50),  # of two epochs: 56 is followed by 131
        10**9 + 1: (3, [8, 5, 1, 11, 17, 22, 6, 18], 8_000_000_050),
    }
    for step, (bucket, labels, position) in pinned.items():
        (batch,) = take(1, start_step=step)
        assert (bucket_of(batch), batch["label"].tolist()) == (bucket, labels)
        assert batch["position"][0] == position
    assert take(14)[13]["position"][-2:].tolist() == [56, 131]


@pytest.mark.parametrize("step", [1, 9, 10, 81, 150])
def test_a_resumed_stream_goes_on_at_any_step(step):
    assert_same(
        take(20, start_step=step, num_threads=3, prefetch_batches=4), take(step + 20)[step:]
    )


def test_a_step_far_ahead_is_found_at_once():
    (batch,) = take(1, start_step=10**9)
    assert batch["label"].shape == (BATCH,)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batches(count):
    parts = [take(90, process_index=index, process_count=count) for index in range(count)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, take(90))


@pytest.mark.parametrize("sizes, batch_size", [((3, 2), 64), ((1,), 5), ((1000, 1), 256)])
def test_fewer_images_than_a_batch_wait_for_later_epochs(sizes, batch_size):
    schedule = BucketSchedule(sizes, batch_size=batch_size, seed=0)
    steps = [schedule(step) for step in range(3 * sum(sizes))]
    for bucket, size in enumerate(sizes):
        assert [rank for number, rank in steps if number == bucket] == list(range(3 * size))


def test_an_empty_bucket_is_refused():
    with pytest.raises(DataError, match="a bucket of it, holds no examples"):
        take(1, sizes=(4, 0))
