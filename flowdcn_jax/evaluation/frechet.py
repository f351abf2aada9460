"""The Fréchet distance of two normal distributions (Heusel et al., arXiv 1706.08500, eq. 6)."""

import numpy as np
from scipy.linalg import lapack

from flowdcn_jax.evaluation.errors import EvaluationError
from flowdcn_jax.evaluation.moments import Gaussian


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), in float64.

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
