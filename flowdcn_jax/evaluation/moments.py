"""Mean and covariance of features, streamed in float64."""

from typing import NamedTuple

import numpy as np

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
