"""Data sets and the shuffled, resumable batch stream.

A batch is `{"image": [n, H, W, C], "label": int32 [n]}`: uint8 pixels 0 .. 255, which are
normalised on the device, or float32 latents, drawn and scaled.
"""

from flowdcn_jax.data.batches import make_batches
from flowdcn_jax.data.builders import prepare_cifar10, write_latents
from flowdcn_jax.data.errors import DataError, DataExistsError, DataNotFoundError
from flowdcn_jax.data.registry import SOURCES, aspect_buckets, make_source
from flowdcn_jax.data.sources import Batch, BucketedSource, Source, buckets_of

__all__ = [
    "SOURCES",
    "Batch",
    "BucketedSource",
    "DataError",
    "DataExistsError",
    "DataNotFoundError",
    "Source",
    "aspect_buckets",
    "buckets_of",
    "make_batches",
    "make_source",
    "prepare_cifar10",
    "write_latents",
]
