"""Published weights of FlowDCN and SiT: their names, their files, and the way here and back."""

from flowdcn_jax.published_weights.conversion import convert, export, warn_of_dit
from flowdcn_jax.published_weights.errors import PublishedWeightsError
from flowdcn_jax.published_weights.process_memory import give_back_freed_arrays

__all__ = ["PublishedWeightsError", "convert", "export", "give_back_freed_arrays", "warn_of_dit"]
