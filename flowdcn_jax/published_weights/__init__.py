"""Published weights of FlowDCN and SiT: their names, their files, and the way here and back."""

from flowdcn_jax.published_weights.conversion import (
    convert,
    export,
    give_back_freed_arrays,
    warn_of_dit,
)
from flowdcn_jax.published_weights.weights_file import PublishedWeightsError

__all__ = ["PublishedWeightsError", "convert", "export", "give_back_freed_arrays", "warn_of_dit"]
