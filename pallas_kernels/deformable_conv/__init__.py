"""Deformable aggregation: each query sums K weighted bilinear samples of its group's channels.

`reference.py` defines what is computed; `api.py` is the way in.
"""

from pallas_kernels.deformable_conv.api import (
    deformable_aggregate,
    multiscale_deformable_aggregate,
)

__all__ = ["deformable_aggregate", "multiscale_deformable_aggregate"]
