"""Figures from features: torch-fidelity's, exact ones, and naive float64 ones."""

import json

import numpy as np
import pytest

from flowdcn_jax.evaluation import (
    EvaluationError,
    frechet_distance,
    kernel_distance,
    neighbours,
    precision_recall,
)
from flowdcn_jax.evaluation.gaussian import BLOCK_ROWS, Gaussian, Moments
from flowdcn_jax.evaluation.inception_score import SPLITS, InceptionScore


@pytest.fixture(scope="module")
def golden(fixture_file):
    """torch-fidelity's features and results."""
    arrays = fixture_file("metrics.npz")
    return arrays | json.loads(str(arrays["result"]))


def gaussian(rows, batch=None):
    moments = Moments(rows.shape[1])
    for start in range(0, len(rows), batch or len(rows)):
        moments.add(rows[start : start + (batch or len(rows))])
    return moments.gaussian()


def exact_distance(x, y):
    """From the features, without covariances: the root's trace is a sum of singular values."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    means = np.sum((x.mean(0) - y.mean(0)) ** 2)
    x, y = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (x, y))
    return means + (x**2).sum() + (y**2).sum() - 2 * np.linalg.svd(x @ y.T)[1].sum()


def test_frechet_distance_is_torch_fidelitys(golden):
    x, y = golden["features_a"], golden["features_b"]
    distance = frechet_distance(gaussian(x), gaussian(y))
    assert distance == pytest.approx(golden["fid"], rel=1e-6)
    assert distance == pytest.approx(223.0474958324, rel=1e-12)  # with means in float64
    assert distance == pytest.approx(exact_distance(x, y), rel=1e-12)


@pytest.mark.parametrize("counts", [(75, 50), (40, 2), (75, 500), (400, 450)])
@pytest.mark.parametrize("decay", [0, 4])
def test_frechet_distance_is_exact_for_singular_and_ill_conditioned_covariances(counts, decay):
    """Fewer images than the 96 features, and variances over eight orders of magnitude."""
    random = np.random.default_rng(0)
    scales = np.logspace(0, -decay, 96).astype(np.float32)
    x, y = (random.gamma(0.5, 0.8, (count, 96)).astype(np.float32) * scales for count in counts)
    distance = frechet_distance(gaussian(x), gaussian(y))
    assert distance == pytest.approx(exact_distance(x, y), rel=1e-10)


@pytest.mark.parametrize("count", [50, 600])
def test_frechet_distance_of_a_set_to_itself_is_zero(count):
    rows = np.random.default_rng(0).gamma(0.5, 0.8, (count, 128)).astype(np.float32)
    same = gaussian(rows)
    assert abs(frechet_distance(same, same)) < 1e-12 * np.trace(same.covariance)


def test_frechet_distance_of_identical_images_is_that_of_the_means():
    ones, twos = (np.full((3000, 16), value, np.float32) for value in (0.1, 0.3))
    assert not gaussian(ones).covariance.any()
    assert frechet_distance(gaussian(ones), gaussian(ones)) == 0
    expected = 16 * (np.float64(np.float32(0.3)) - np.float64(np.float32(0.1))) ** 2
    assert frechet_distance(gaussian(ones), gaussian(twos)) == pytest.approx(expected, rel=1e-14)
    rows = np.random.default_rng(0).random((100, 16), np.float32)
    trace = np.trace(gaussian(rows).covariance)
    means = np.sum((rows.mean(0, dtype=np.float64) - ones[0]) ** 2)
    distance = frechet_distance(gaussian(ones), gaussian(rows))
    assert distance == pytest.approx(means + trace, rel=1e-14)


def test_frechet_distance_of_other_numbers_of_features_is_refused():
    x, y = (Gaussian(np.zeros(size), np.eye(size)) for size in (3, 4))
    with pytest.raises(EvaluationError, match="of 3 and of 4 features"):
        frechet_distance(x, y)


def test_moments_are_numpys_and_the_same_bits_for_any_batches():
    rows = 100 + np.random.default_rng(0).random((2 * BLOCK_ROWS + 77, 40), np.float32)
    mean, covariance = gaussian(rows)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(exact, rowvar=False), rtol=0, atol=1e-14)
    for batch in (1000, 2048, 4173):
        again = gaussian(rows, batch)
        assert np.array_equal(again.mean, mean) and np.array_equal(again.covariance, covariance)


def score(logits, splits, batch=64):
    streamed = InceptionScore(splits)
    for start in range(0, len(logits), batch):
        streamed.add(logits[start : start + batch])
    return streamed.scores()


def test_inception_score_is_torch_fidelitys(golden):
    scores = score(golden["logits"], np.arange(1000) * 10 // 1000)
    assert scores.mean() == pytest.approx(golden["inception_score_mean"], rel=1e-12)
    assert scores.std() == pytest.approx(golden["inception_score_std"], rel=1e-12)


def naive_score(logits):
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), axis=1)))


def test_protocols_split_for_the_inception_score_as_their_evaluators():
    logits = np.random.default_rng(0).normal(size=(12_345, 7)).astype(np.float32)
    expected = [naive_score(logits[start : start + 5000]) for start in (0, 5000, 10_000)]
    np.testing.assert_allclose(score(logits, SPLITS["adm"](12_345)), expected, rtol=1e-12)
    shuffled = logits[np.random.RandomState(2020).permutation(12_345)]
    edges = [index * 12_345 // 10 for index in range(11)]
    expected = [naive_score(shuffled[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    splits = SPLITS["torch_fidelity"](12_345)
    np.testing.assert_allclose(score(logits, splits), expected, rtol=1e-12)
    assert sorted(SPLITS["torch_fidelity"](3)) == [0, 1, 2]  # no empty split


def test_inception_score_of_probabilities_that_underflow_is_finite():
    logits = np.float32(1e4) * np.eye(5, 6, dtype=np.float32)  # the last class never comes
    assert score(logits, np.zeros(5, int)) == pytest.approx([5])


def naive_precision_recall(x, y, k):
    x, y = x.astype(np.float64), y.astype(np.float64)

    def distances(u, v):
        return np.stack([((row - v) ** 2).sum(1) for row in u])

    def inside(u, v):
        radii = np.sort(distances(v, v), axis=1)[:, k]
        return np.mean((distances(u, v) <= radii).any(axis=1))

    return inside(x, y), inside(y, x)


def test_precision_and_recall_are_torch_fidelitys(golden):
    found = precision_recall(golden["features_a"], golden["features_b"])
    assert found == pytest.approx((golden["precision"], golden["recall"]), abs=1e-7)


@pytest.mark.parametrize("counts", [(170, 90), (4, 33)])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_a_naive_float64_computation(counts, k, monkeypatch):
    """Also where several blocks of rows and columns are needed, the last of them filled up."""
    random = np.random.default_rng(1)
    x = random.normal(5, 1, (counts[0], 20)).astype(np.float32)
    y = random.normal(5.2, 1.1, (counts[1], 20)).astype(np.float32)
    expected = naive_precision_recall(x, y, k)
    assert 0 < max(expected) and min(expected) < 1
    assert precision_recall(x, y, neighbours=k) == expected
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 16)
    assert precision_recall(x, y, neighbours=k) == expected


@pytest.mark.gpu
def test_distances_are_exact_enough_on_gpus():
    """Neighbours much nearer than the origin: of products in TF32 the shares are others."""
    random = np.random.default_rng(0)
    centres = np.repeat(random.normal(size=(70, 256)), 10, axis=0)
    x, y = (centres + 0.05 * random.normal(size=(2, 700, 256))).astype(np.float32)
    assert precision_recall(x, y) == naive_precision_recall(x, y, 3)


def test_precision_and_recall_of_equal_and_repeated_images():
    x = 30 + np.random.default_rng(0).random((50, 64), np.float32)
    assert precision_recall(x, x[::-1]) == (1, 1)
    repeated = np.repeat(x[:1], 10, axis=0)
    assert precision_recall(repeated, repeated) == (1, 1)
    assert precision_recall(repeated, repeated + 1) == (0, 0)
    assert precision_recall(repeated, x) == (1, 0.02)
    # Balls without extent hold what is at their centre, in whatever order products are added up.
    x = 30 + np.random.default_rng(0).random((111, 64), np.float32)
    copies = np.random.default_rng(1).permutation(np.repeat(x, 7, axis=0))
    assert precision_recall(x[:9], copies)[0] == 1


def test_kernel_distance_is_torch_fidelitys(golden):
    x, y = golden["features_a"], golden["features_b"]
    distances = kernel_distance(x, y, subset_size=200)
    assert distances.mean() == pytest.approx(3.8724505267682, rel=1e-12)
    assert distances.std() == pytest.approx(0.1624019715, rel=1e-8)


def test_kernel_distance_of_whole_sets_is_that_of_a_naive_computation():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 6, 4)).astype(np.float32)

    def kernel(u, v):
        return (sum(float(a) * float(b) for a, b in zip(u, v, strict=True)) / 4 + 1) ** 3

    within = [
        kernel(rows[i], rows[j]) for rows in (x, y) for i in range(6) for j in range(6) if i != j
    ]
    between = [kernel(u, v) for u in x for v in y]
    expected = sum(within) / 30 - 2 * sum(between) / 36
    found = kernel_distance(x, y, num_subsets=3, subset_size=6)
    np.testing.assert_allclose(found, [expected] * 3, rtol=1e-12)
