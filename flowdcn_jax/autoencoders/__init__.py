"""Autoencoders: between images and the space that the model works in.

`load_autoencoder(config.autoencoder)` gives an `Autoencoder`, whichever the config names.
"""

from flowdcn_jax.autoencoders.autoencoder import (
    AUTOENCODERS,
    PUBLISHED_DOWNSAMPLING,
    Autoencoder,
    check_fits,
    decode_images,
    decode_pixels,
    load_autoencoder,
    preview_latents,
    to_unit_range,
)
from flowdcn_jax.autoencoders.weights import AutoencoderError, WeightsNotFoundError

__all__ = [
    "AUTOENCODERS",
    "PUBLISHED_DOWNSAMPLING",
    "Autoencoder",
    "AutoencoderError",
    "WeightsNotFoundError",
    "check_fits",
    "decode_images",
    "decode_pixels",
    "load_autoencoder",
    "preview_latents",
    "to_unit_range",
]
