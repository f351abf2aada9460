"""One pass over images: the same statistics for any batches, files, devices and processes."""

import threading

import numpy as np
import pytest

from flowdcn_jax.evaluation import (
    EvaluationError,
    ImageSet,
    collect,
    open_images,
)
from tests.evaluation import fakes

NUM_IMAGES = 101


@pytest.fixture(scope="module")
def images():
    return fakes.random_images(NUM_IMAGES)


@pytest.fixture(scope="module")
def one_file(tmp_path_factory, images):
    return fakes.save(tmp_path_factory.mktemp("one") / "samples.npz", images)


@pytest.fixture(scope="module")
def statistics(one_file):
    return collect(open_images(one_file), fakes.FakeFeatures(NUM_IMAGES))


def check_same(found, expected, rtol=1e-9):
    assert found.count == expected.count
    for name, (mean, covariance) in expected.gaussians.items():
        np.testing.assert_allclose(found.gaussians[name].mean, mean, rtol=rtol)
        np.testing.assert_allclose(
            found.gaussians[name].covariance, covariance, rtol=rtol, atol=rtol * covariance.max()
        )
    np.testing.assert_allclose(found.scores, expected.scores, rtol=rtol)
    np.testing.assert_array_equal(found.features, expected.features)


def test_statistics_are_those_of_all_features_at_once(images, statistics):
    outputs = fakes.outputs(images)
    np.testing.assert_array_equal(statistics.features, outputs["features"])
    for name in ("features", "spatial"):
        rows = outputs[name].astype(np.float64)
        mean, covariance = statistics.gaussians[name]
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-14)
        np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), atol=1e-14)
    assert statistics.count == NUM_IMAGES and statistics.images["size"] == (8, 9)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_any_batch_size_gives_the_same(one_file, statistics, batch_size):
    features = fakes.FakeFeatures(batch_size)
    check_same(collect(open_images(one_file), features), statistics)
    assert features.calls == -(-NUM_IMAGES // batch_size)


def test_shards_give_the_same_as_one_file(tmp_path, images, statistics):
    for index, start in enumerate((0, 40, 41, 90)):
        stop = (40, 41, 90, NUM_IMAGES)[index]
        save = np.savez_compressed if index % 2 else np.savez
        save(tmp_path / f"{index}.npz", arr_0=images[start:stop], arr_1=np.arange(stop - start))
    check_same(collect(open_images(str(tmp_path)), fakes.FakeFeatures(7)), statistics)


def test_kept_features_lie_evenly_among_all(one_file, statistics):
    some = collect(open_images(one_file), fakes.FakeFeatures(7), num_features=4)
    np.testing.assert_array_equal(some.features, statistics.features[[0, 25, 50, 75]])
    assert some.count == NUM_IMAGES


def test_images_are_read_while_others_are_measured(images):
    begun = [threading.Event() for _ in range(4)]

    def read(ranges):
        for number, each in enumerate(ranges):
            begun[number].set()
            yield images[each.start : each.stop]

    class Waiting(fakes.FakeFeatures):
        def __call__(self, images):
            following = min(self.calls + 1, 3)
            assert begun[following].wait(timeout=60), f"batch {following} is not begun"
            return super().__call__(images)

    found = collect(ImageSet("some", 40, (8, 9), read), Waiting(10))
    np.testing.assert_array_equal(found.features, fakes.outputs(images[:40])["features"])


def test_bad_features_and_counts_are_refused(tmp_path, images):
    class NotANumber(fakes.FakeFeatures):
        def __call__(self, images):
            outputs = super().__call__(images)
            outputs["spatial"][2, 1] = np.nan
            return outputs

    path = fakes.save(tmp_path / "x.npz", images[:9])
    with pytest.raises(EvaluationError, match="spatial of image 2 of .*x.npz are not finite"):
        collect(open_images(path), NotANumber(9))
    one = fakes.save(tmp_path / "one.npz", images[:1])
    with pytest.raises(EvaluationError, match="one.npz holds 1 image; expected at least 2"):
        collect(open_images(one), fakes.FakeFeatures())
