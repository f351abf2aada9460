"""From images to cached latents, encoded once; see `flowdcn_jax.tools.cache_latents`."""

from flowdcn_jax.caching.job import Job
from flowdcn_jax.caching.parts import TooManyBadError
from flowdcn_jax.caching.share import cache_latents

__all__ = ["Job", "TooManyBadError", "cache_latents"]
