"""From a training run to pictures: what sample.py, the grids in training and Python users share."""

from flowdcn_jax.sampling.classes import labels_in_turn, parse_classes
from flowdcn_jax.sampling.compare import compare_to_png
from flowdcn_jax.sampling.generator import (
    generate_images,
    initial_noise,
    load_model,
    load_weights,
    make_generator,
)
from flowdcn_jax.sampling.request import Request
from flowdcn_jax.sampling.run import generate, sample_to_folder
from flowdcn_jax.sampling.settings import SamplingError, Settings, parse_interval
from flowdcn_jax.sampling.trained_model import TrainedModel, load_trained

__all__ = [
    "Request",
    "SamplingError",
    "Settings",
    "TrainedModel",
    "compare_to_png",
    "generate",
    "generate_images",
    "initial_noise",
    "labels_in_turn",
    "load_model",
    "load_trained",
    "load_weights",
    "make_generator",
    "parse_classes",
    "parse_interval",
    "sample_to_folder",
]
