"""Which norm a kernel computes."""

from typing import NamedTuple


class Norm(NamedTuple):
    """Over a token's channels, in float32, without a weight."""

    centred: bool  # LayerNorm takes the mean away, RMSNorm does not
    epsilon: float
