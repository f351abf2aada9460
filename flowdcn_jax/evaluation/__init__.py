"""Evaluation: feature networks, and figures from their features."""

from flowdcn_jax.evaluation.features import load_features

__all__ = ["load_features"]
