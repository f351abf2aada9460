"""Feature networks: `load_features` gives a function from images to features."""

from flowdcn_jax.evaluation.features.extractor import Description, FeatureExtractor
from flowdcn_jax.evaluation.features.registry import (
    NETWORKS,
    PROTOCOLS,
    load_features,
    named_features,
)
from flowdcn_jax.evaluation.features.weights import FeaturesError, WeightsNotFoundError

__all__ = [
    "NETWORKS",
    "PROTOCOLS",
    "Description",
    "FeatureExtractor",
    "FeaturesError",
    "WeightsNotFoundError",
    "load_features",
    "named_features",
]
