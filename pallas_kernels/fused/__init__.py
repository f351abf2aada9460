"""What stands between two matrix products of a block, in one pass over memory.

Kernels for 16-bit arrays on NVIDIA GPUs, computing in float32, beside their plain JAX.
"""

from pallas_kernels.fused.adaln import residual_adaln, residual_adaln_reference
from pallas_kernels.fused.gating import swiglu, swiglu_reference
from pallas_kernels.fused.norm import Norm
from pallas_kernels.fused.operator import takes_kernels

__all__ = [
    "Norm",
    "residual_adaln",
    "residual_adaln_reference",
    "swiglu",
    "swiglu_reference",
    "takes_kernels",
]
