"""Evaluation: how far generated images are from real ones, by published protocols.

`evaluate(samples, references, features)` compares two sides, each images or their statistics, that
`open_side` opens; `load_features` gives the network.  docs/evaluation.md says what figures are.
"""

from flowdcn_jax.evaluation.errors import EvaluationError
from flowdcn_jax.evaluation.features import load_features
from flowdcn_jax.evaluation.figures import Figure
from flowdcn_jax.evaluation.frechet import frechet_distance
from flowdcn_jax.evaluation.image_sets import ImageSet, open_images
from flowdcn_jax.evaluation.kernel_distance import kernel_distance
from flowdcn_jax.evaluation.neighbours import precision_recall
from flowdcn_jax.evaluation.reference_files import open_side, read_statistics, write_statistics
from flowdcn_jax.evaluation.report import Report, evaluate, needs_network
from flowdcn_jax.evaluation.statistics import Features, Statistics, collect

__all__ = [
    "EvaluationError",
    "Features",
    "Figure",
    "ImageSet",
    "Report",
    "Statistics",
    "collect",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "load_features",
    "needs_network",
    "open_images",
    "open_side",
    "precision_recall",
    "read_statistics",
    "write_statistics",
]
