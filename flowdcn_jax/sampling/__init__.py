"""From a training run to pictures: what sample.py, the grids in training and Python users share."""

from flowdcn_jax.sampling.classes import labels_in_turn, parse_classes
from flowdcn_jax.sampling.command import sample_to_folder
from flowdcn_jax.sampling.generator import (
    generate_images,
    initial_noise,
    load_model,
    load_weights,
    make_generator,
)
from flowdcn_jax.sampling.settings import SamplingError, Settings

__all__ = [
    "SamplingError",
    "Settings",
    "generate_images",
    "initial_noise",
    "labels_in_turn",
    "load_model",
    "load_weights",
    "make_generator",
    "parse_classes",
    "sample_to_folder",
]
