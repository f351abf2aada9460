"""Comparing with recorded runs of a chaotic model, which nobody can repeat to the digit.

The fixtures' random networks multiply a difference of one float32 rounding up to the size of the
image within five to ten evaluations, so a recorded result is one draw of many. What can be asked of
it: that it looks like a draw of our runs (started from noise that differs by rounding), and not
like one of a sampler with other rules.
"""

import numpy as np

ROUNDING = 1e-6  # of one evaluation of these networks in float32, or less


def perturbed(x: np.ndarray, members: int, *, rounding: float = ROUNDING) -> np.ndarray:
    """x [B,...] and copies rounded each its own way, as one batch [members*B,...]; x is first."""
    noise = np.random.default_rng(0).standard_normal((members, *x.shape))
    noise[0] = 0
    return (x * (1 + rounding * noise)).astype(np.float32).reshape(-1, *x.shape[1:])


def spread_ratio(recorded: np.ndarray, ours: np.ndarray) -> float:
    """How far `recorded` is from our runs' mean [members,...], in units of how far a run is."""
    total, members = ours.sum(axis=0), len(ours)
    own = [np.linalg.norm(run - (total - run) / (members - 1)) for run in ours]
    expected = np.mean(own) * np.sqrt((members**2 - 1) / members**2)  # the mean of one run more
    return float(np.linalg.norm(recorded - total / members) / expected)


def position(recorded: np.ndarray, ours: np.ndarray, other: np.ndarray) -> float:
    """Where `recorded` lies on the way from the mean of our runs, 0, to that of others, 1.

    The mean that it is measured from and the direction come from different halves of the runs, so
    that their noise cancels out.
    """
    half = len(ours) // 2
    halves = (slice(None, half), slice(half, None))
    ours, other = ([runs[part].mean(axis=0) for part in halves] for runs in (ours, other))
    along = sum(np.vdot(recorded - ours[i], other[1 - i] - ours[1 - i]) for i in (0, 1))
    whole = sum(np.vdot(other[i] - ours[i], other[1 - i] - ours[1 - i]) for i in (0, 1))
    return float(along / whole)
