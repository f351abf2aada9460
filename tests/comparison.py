"""How tests compare arrays."""

import numpy as np


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| in float64; for zeros, 0 of zeros and else infinite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    length = np.linalg.norm(expected)
    if length == 0:
        return np.inf if actual.any() else 0.0
    return float(np.linalg.norm(actual - expected) / length)
