"""Published weights by name: where they are from, and a cache that is never wrong."""

from flowdcn_jax.named_weights.cache import (
    NamedWeightsError,
    fetch,
    folder_of,
    is_prepared,
    offline,
    prepared,
    remove,
    summary,
)
from flowdcn_jax.named_weights.table import TABLE, File, NamedWeights, find, named

__all__ = [
    "TABLE",
    "File",
    "NamedWeights",
    "NamedWeightsError",
    "fetch",
    "find",
    "folder_of",
    "is_prepared",
    "named",
    "offline",
    "prepared",
    "remove",
    "summary",
]
