"""Layers that the feature networks share.

Parameters are float32, and loaded: kernels start at zero, which is the fastest to trace. `dtype` is
the compute dtype. How exactly float32 is multiplied is said once for a network, by what runs it
(jax.default_matmul_precision).
"""

from functools import partial

from flax import nnx

_ZEROS = nnx.initializers.zeros_init()

conv = partial(nnx.Conv, kernel_init=_ZEROS)  # by default padded as TensorFlow's SAME
linear = partial(nnx.Linear, kernel_init=_ZEROS)
batch_norm = partial(nnx.BatchNorm, use_running_average=True, epsilon=1e-3)  # TensorFlow's
layer_norm = partial(nnx.LayerNorm, use_fast_variance=False, epsilon=1e-6)
