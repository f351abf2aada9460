"""Mean and covariance of features, streamed in float64, and how far two such pairs are apart."""

from typing import NamedTuple

import numpy as np
from scipy.linalg import lapack

from flowdcn_jax.evaluation.settings import EvaluationError

BLOCK_ROWS = 2048  # rows that are added at a time, whatever the batches are


class Gaussian(NamedTuple):
    """The normal distribution of some features' mean and covariance."""

    mean: np.ndarray  # float64 [D]
    covariance: np.ndarray  # float64 [D,D], divided by n - 1


class Moments:
    """Sums over rows of D features, from which mean and covariance follow.

    Each block of rows is centred on its own mean and then joined to the others (Chan et al. 1983):
    no digits cancel, and the covariance of identical rows is exactly 0.  Blocks end at multiples of
    BLOCK_ROWS, so batches of any size give the same bits.
    """

    def __init__(self, num_features: int):
        self.count = 0
        self._mean = np.zeros(num_features)
        self._scatter = np.zeros((num_features, num_features))  # sum of (x - mean) (x - mean)^T
        self._block = np.empty((BLOCK_ROWS, num_features), np.float32)
        self._filled = 0

    def add(self, rows: np.ndarray) -> None:
        """Counts float32 rows [n,D]."""
        while len(rows):
            taken = min(BLOCK_ROWS - self._filled, len(rows))
            self._block[self._filled : self._filled + taken] = rows[:taken]
            self._filled += taken
            rows = rows[taken:]
            if self._filled == BLOCK_ROWS:
                self._join_block()

    def gaussian(self) -> Gaussian:
        """Of all rows, two at least; no rows can be added after it."""
        self._join_block()
        return Gaussian(self._mean, self._scatter / (self.count - 1))

    def _join_block(self) -> None:
        count, self._filled = self._filled, 0
        if not count:
            return
        rows = self._block[:count].astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        difference, total = mean - self._mean, self.count + count
        self._scatter += rows.T @ rows
        self._scatter += np.outer(difference * (self.count * count / total), difference)
        self._mean += difference * (count / total)
        self.count = total


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), in float64 (arXiv 1706.08500, eq. 6).

    With C = L L^T the last trace is the sum of the singular values of L1^T L2: the square roots of
    the eigenvalues of the symmetric L1^T C2 L1, without squaring them first.  So rounding stays
    near 1e-16 of the traces, where an eigenvalue that is 0 up to 1e-16 would have a root of 1e-8.
    Covariances may be singular (fewer images than features, identical images): each L has as many
    columns as its covariance has rank.

    Returns:
        A finite number.  Of equal distributions it is 0 up to rounding, of either sign.

    Raises:
        EvaluationError: the distributions have different numbers of features.
    """
    if len(first.mean) != len(second.mean):
        raise EvaluationError(
            f"statistics of {len(first.mean)} and of {len(second.mean)} features; expected as many"
        )
    product = _factor(first.covariance).T @ _factor(second.covariance)
    root_trace = np.linalg.svd(product, compute_uv=False).sum()
    means = np.sum((first.mean - second.mean) ** 2)
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(means + traces - 2 * root_trace)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """L [D,rank] with L L^T = covariance: Cholesky's, with pivots.

    It ends where what is left is rounding: below D * 2.2e-16 of the largest variance.
    """
    packed, pivots, rank, _ = lapack.dpstrf(covariance, lower=1)
    factor = np.empty((len(covariance), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor
