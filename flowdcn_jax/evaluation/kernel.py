"""KID, the kernel distance (Binkowski et al., arXiv 1801.01401)."""

import numpy as np

NUM_SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020


def kernel_distance(
    samples: np.ndarray,
    references: np.ndarray,
    *,
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
) -> np.ndarray:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3, of pairs of random subsets, in float64.

    The subsets are torch-fidelity's: for each pair first of the samples, then of the references,
    drawn without replacement.

    Args:
        samples: float32 [N,D].
        references: float32 [M,D].
        num_subsets: pairs.
        subset_size: rows of each; at most N and M, at least 2.

    Returns:
        float64 [num_subsets].  KID is their mean, and may be negative.
    """
    random = np.random.RandomState(SEED)
    distances = np.empty(num_subsets)
    for index in range(num_subsets):
        x, y = (
            rows[random.choice(len(rows), subset_size, replace=False)].astype(np.float64)
            for rows in (samples, references)
        )
        distances[index] = _squared_mmd(x, y)
    return distances


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    size = len(x)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (size * (size - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    products = x @ y.T
    products /= x.shape[1]
    products += 1
    return products * products * products  # ten times as fast as ** 3
