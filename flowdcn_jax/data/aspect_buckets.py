"""Buckets of aspect ratios, for VAR training (FlowDCN's "various aspect ratios")."""

import dataclasses
import functools
import math

import numpy as np
from ml_collections import ConfigDict

from flowdcn_jax.data.prepared import DataError

MAX_NUMBER = 2**16  # of pixels of a side, and of aspects: more than anybody has


@dataclasses.dataclass(frozen=True)
class AspectBuckets:
    """Image sizes of nearly one area whose aspects (width / height) are evenly spaced.

    Aspect a has width image_size * sqrt(a) and height image_size / sqrt(a), both rounded down to a
    multiple of `side_multiple`.  Aspects that end at the same size share a bucket.

    Attributes:
        image_size: root of the area, pixels.
        count: number of aspects, the two ends included; 1 means min_aspect alone.
        min_aspect: width / height of the tallest.
        max_aspect: width / height of the widest.
        side_multiple: pixels.

    Raises:
        DataError: a value out of range, or a side that would be rounded down to nothing.
    """

    image_size: int
    count: int
    min_aspect: float
    max_aspect: float
    side_multiple: int

    def __post_init__(self):
        for name in ("image_size", "count", "side_multiple"):
            if not 1 <= getattr(self, name) <= MAX_NUMBER:
                raise DataError(f"{name} is {getattr(self, name)}; expected 1 to {MAX_NUMBER}")
        if not 0 < self.min_aspect <= self.max_aspect < math.inf:
            raise DataError(
                f"aspects go from {self.min_aspect} to {self.max_aspect}; expected two positive "
                "numbers, the smaller first"
            )
        if min(map(min, self.sizes)) < 1:
            raise DataError(
                f"aspects from {self.min_aspect} to {self.max_aspect} are too extreme for "
                f"image_size={self.image_size}: a side would be less than "
                f"side_multiple={self.side_multiple} pixels"
            )

    @functools.cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The distinct (height, width), pixels, from the tallest to the widest."""
        return tuple(dict.fromkeys(self._size_of_aspect))

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The bucket's (height, width) for an image of height x width: nearest in aspect."""
        return self._size_of_aspect[int(np.abs(self._aspects - width / height).argmin())]

    @functools.cached_property
    def _aspects(self) -> np.ndarray:
        return np.linspace(self.min_aspect, self.max_aspect, self.count)

    @functools.cached_property
    def _size_of_aspect(self) -> tuple[tuple[int, int], ...]:
        def rounded_down(side: float) -> int:
            return int(side // self.side_multiple) * self.side_multiple

        return tuple(
            (
                rounded_down(self.image_size / math.sqrt(aspect)),
                rounded_down(self.image_size * math.sqrt(aspect)),
            )
            for aspect in self._aspects
        )


def aspect_buckets(data_config: ConfigDict) -> AspectBuckets | None:
    """The buckets of config.data; None for images of one size.

    Raises:
        DataError: a value out of range.
    """
    if not data_config.aspect_buckets.count:
        return None
    return AspectBuckets(image_size=data_config.image_size, **data_config.aspect_buckets)
