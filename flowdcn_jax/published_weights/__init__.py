"""Published weights of FlowDCN and SiT: their names, their files, and the way here and back."""

from flowdcn_jax.published_weights.conversion import convert, export
from flowdcn_jax.published_weights.errors import PublishedWeightsError

__all__ = ["PublishedWeightsError", "convert", "export"]
