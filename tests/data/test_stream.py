"""The batch stream: order, resumption, processes, and the random numbers behind it."""

import itertools

import numpy as np
import pytest

from flowdcn_jax.data import DataError, make_batches, randomness
from flowdcn_jax.data.batches import ShuffledOrder

SIZE = 50


class IndexSource:
    """Returns the index as the label and one random number a position as the image."""

    image_shape = (1, 1, 1)
    num_classes = SIZE
    class_names = None

    def __init__(self, size=SIZE):
        self._size = size

    def __len__(self):
        return self._size

    def read(self, indices, positions, seed):
        image = np.empty((len(indices), 1, 1, 1), np.float32)
        randomness.fill_standard_normal(image, positions, seed=seed)
        return {"image": image, "label": indices.astype(np.int32)}


def take(count, *, source=None, **options):
    defaults = {"batch_size": 8, "seed": 3, "num_threads": 0, "prefetch_batches": 0}
    batches = make_batches(source or IndexSource(), **(defaults | options))
    return list(itertools.islice(batches, count))


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys() == {"image", "label"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_seed_decides_the_stream_whatever_the_threads(threads):
    assert_same(take(20, num_threads=threads, prefetch_batches=6), take(20))


def test_other_seeds_give_other_orders_and_noise():
    streams = [take(7, seed=seed) for seed in (3, 4, 5)]
    for one, other in itertools.combinations(streams, 2):
        assert not np.array_equal(labels_of(one), labels_of(other))
        assert not np.array_equal(one[0]["image"], other[0]["image"])


def test_each_epoch_visits_every_example_once_in_a_new_order():
    epochs = labels_of(take(25)).reshape(4, SIZE)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(SIZE), (4, 1)))
    assert len(np.unique(epochs, axis=0)) == 4


def test_next_epoch_is_not_the_next_seeds_epoch():
    second_epoch = labels_of(take(2, batch_size=SIZE))[SIZE:]
    assert not np.array_equal(second_epoch, labels_of(take(1, batch_size=SIZE, seed=4)))


@pytest.mark.parametrize("step", [1, 6, 7, 23])
def test_resuming_at_a_step_continues_the_stream(step):
    assert_same(take(5, start_step=step, num_threads=2, prefetch_batches=3), take(step + 5)[step:])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_local_batches_concatenate_to_the_global_batch(count):
    shards = [take(9, process_index=index, process_count=count) for index in range(count)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert_same(joined, take(9))


def test_batch_size_changes_neither_order_nor_noise():
    small, large = take(12, batch_size=4), take(4, batch_size=12)
    for name in ("image", "label"):
        np.testing.assert_array_equal(
            np.concatenate([batch[name] for batch in small]),
            np.concatenate([batch[name] for batch in large]),
        )


def test_a_batch_may_hold_several_epochs():
    labels = take(1, source=IndexSource(3), batch_size=12)[0]["label"]
    np.testing.assert_array_equal(np.sort(labels.reshape(4, 3), axis=1), [[0, 1, 2]] * 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batch_size": 6, "process_count": 4}, "not divisible"),
        ({"process_index": 2, "process_count": 2}, "process_index"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"start_step": -1}, "start_step"),
        ({"num_threads": -1}, "num_threads"),
        ({"prefetch_batches": -1}, "prefetch_batches"),
        ({"source": IndexSource(0)}, "no examples"),
    ],
)
def test_bad_arguments_are_named_before_any_work(options, message):
    defaults = {"batch_size": 8, "seed": 3, "num_threads": 0, "prefetch_batches": 0}
    source = options.pop("source", IndexSource())
    with pytest.raises(DataError, match=message):
        make_batches(source, **(defaults | options))


def test_an_error_in_a_reader_thread_reaches_the_caller():
    class Broken(IndexSource):
        def read(self, indices, positions, seed):
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        take(1, source=Broken(), num_threads=2, prefetch_batches=2)


def test_shuffle_puts_every_example_everywhere():
    epochs = 4000
    order = ShuffledOrder(5, seed=11)(np.arange(5 * epochs)).reshape(epochs, 5)
    counts = np.stack([np.bincount(column, minlength=5) for column in order.T])
    expected, deviation = epochs / 5, np.sqrt(epochs * 0.2 * 0.8)
    assert np.abs(counts - expected).max() < 5 * deviation


def test_random_bits_are_fair_and_independent_of_their_neighbours():
    count = 40_000
    bits = randomness.random_bits(np.arange(count), seed=0, purpose=randomness.FLIP)
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(count)
    assert abs((bits[1:] == bits[:-1]).mean() - 0.5) < 5 * 0.5 / np.sqrt(count)


def test_hash_does_not_change_so_that_old_runs_resume():
    words = randomness.hash64(np.arange(3), seed=1, purpose=randomness.SHUFFLE, epoch=2)
    assert words.dtype == np.uint64
    expected = [583229529248944353, 3194203982304717363, 4536883445053795217]
    assert [int(word) for word in words] == expected


def test_the_order_does_not_change_so_that_old_runs_resume():
    pinned = {
        0: [28, 35, 1, 11, 8, 41, 31, 15],
        6: [21, 36, 35, 15, 2, 31, 7, 32],  # of two epochs
        10**6: [39, 41, 23, 27, 10, 0, 2, 12],
    }
    for step, expected in pinned.items():
        (batch,) = take(1, start_step=step)
        assert batch["label"].tolist() == expected
        (half,) = take(1, start_step=step, process_index=1, process_count=2)
        assert half["label"].tolist() == expected[4:]


def test_flips_and_crops_do_not_change_so_that_old_runs_resume():
    bits = randomness.random_bits(np.arange(24), seed=3, purpose=randomness.FLIP)
    assert "".join(map(str, bits.astype(int))) == "010110110000000100010010"
    places = randomness.uniform(np.array([0, 1, 10**12]), seed=3, purpose=randomness.CROP)
    assert places.tolist() == [0.2747610321593562, 0.5057329843675691, 0.9425787526133649]


def test_noise_does_not_change_so_that_old_runs_resume():
    noise = np.empty((3, 2), np.float32)
    randomness.fill_standard_normal(noise, np.array([0, 7, 10**12]), seed=5)
    expected = [[2.1622317, 2.2691813], [0.11537185, -0.8721923], [-1.0976195, 0.23961174]]
    np.testing.assert_array_equal(noise, np.array(expected, np.float32))


def test_noise_is_standard_normal_and_belongs_to_its_position():
    noise = np.empty((64, 1000), np.float32)
    randomness.fill_standard_normal(noise, np.arange(64), seed=5)
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)
    correlation = np.corrcoef(noise) - np.eye(64)
    assert np.abs(correlation).max() < 6 / np.sqrt(1000)
    alone = np.empty((2, 1000), np.float32)
    randomness.fill_standard_normal(alone, np.array([63, 7]), seed=5)
    np.testing.assert_array_equal(alone, noise[[63, 7]])
