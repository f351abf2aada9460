"""Data sets and the shuffled, resumable batch stream.

A batch is `{"image": [n, H, W, C], "label": int32 [n]}`: uint8 pixels 0 .. 255, which are
normalised on the device, or float32 latents, drawn and scaled.
"""

from flowdcn_jax.data.aspect_buckets import aspect_buckets
from flowdcn_jax.data.batches import Batch, BucketedSource, DataSource, buckets_of, make_batches
from flowdcn_jax.data.cifar10 import prepare_cifar10
from flowdcn_jax.data.latents import write_latents
from flowdcn_jax.data.prepared import DataError, DataExistsError, DataNotFoundError
from flowdcn_jax.data.sources import SOURCES, make_source

__all__ = [
    "SOURCES",
    "Batch",
    "BucketedSource",
    "DataError",
    "DataExistsError",
    "DataNotFoundError",
    "DataSource",
    "aspect_buckets",
    "buckets_of",
    "make_batches",
    "make_source",
    "prepare_cifar10",
    "write_latents",
]
