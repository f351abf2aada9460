"""Which images are asked for."""

import dataclasses
from collections.abc import Sequence

from flowdcn_jax.sampling.classes import check_order
from flowdcn_jax.sampling.settings import check_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """How many images, and of which classes. sample.py's flags, by name.

    Attributes:
        classes: names and numbers, see `classes.parse_classes`; None: config.sampling.classes.
        labels: "balanced", the classes in turn, or "random".
        num_images: in all; None: config.sampling.num_images.
        batch_size: images that a device draws at a time, if there are as many. They should be few
            enough that several devices share a small job.

    Raises:
        SamplingError: a count that is no whole number of at least 1, or an unknown order.
    """

    classes: Sequence[str | int] | str | int | None = None
    labels: str = "balanced"
    num_images: int | None = None
    batch_size: int = 16

    def __post_init__(self):
        if self.num_images is not None:
            check_integer("num_images", self.num_images, minimum=1)
        check_integer("batch_size", self.batch_size, minimum=1)
        check_order(self.labels)
