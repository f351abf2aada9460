"""What is to be cached, and where it goes."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from flowdcn_jax.autoencoders import Autoencoder
from flowdcn_jax.data import DataError
from flowdcn_jax.data.aspect_buckets import AspectBuckets
from flowdcn_jax.data.labelled_images import LabelledImages
from flowdcn_jax.data.latents import ImagenetLatents, latents_config_name, moment_names
from flowdcn_jax.data.prepared import split_name

Size = tuple[int, int]  # (height, width)


@dataclasses.dataclass(frozen=True)
class Job:
    """One data set of images, in the latents of one autoencoder, at one size or set of buckets.

    Attributes:
        dataset: what the images are, the same however a user spells it.
        split: of the TFDS data set, perhaps a slice; its name is that of the split written.
        images: the list of images.
        autoencoder: it encodes them.
        autoencoder_dtype: its compute dtype.
        image_size: side of the centre crop, pixels; of buckets the root of their area.
        buckets: None for the centre crop.
        data_dir: folder of prepared data sets.
    """

    dataset: str
    split: str
    images: LabelledImages
    autoencoder: Autoencoder
    autoencoder_dtype: str
    image_size: int
    buckets: AspectBuckets | None
    data_dir: Path

    def __post_init__(self):
        stride = self.autoencoder.downsampling
        for size in self.image_sizes:
            if any(side % stride for side in size):
                raise DataError(
                    f"images of {size[0]}x{size[1]} pixels do not fit the autoencoder "
                    f"{self.autoencoder.name!r}: expected multiples of {stride}"
                )

    @property
    def image_sizes(self) -> tuple[Size, ...]:
        """Pixels."""
        return self.buckets.sizes if self.buckets else ((self.image_size, self.image_size),)

    @property
    def latent_sizes(self) -> tuple[Size, ...]:
        """Latent pixels, in the order of `image_sizes`."""
        stride = self.autoencoder.downsampling
        return tuple((height // stride, width // stride) for height, width in self.image_sizes)

    @property
    def written_split(self) -> str:
        """The name alone, without a slice."""
        return split_name(self.split)

    @property
    def mirrored(self) -> bool:
        """VAR training shows no mirror images (FlowDCN's released code), so none are cached."""
        return self.buckets is None

    @property
    def settings(self) -> dict[str, Any]:
        """All that the latents depend on, in the types of JSON."""
        autoencoder = self.autoencoder
        return {
            "dataset": self.dataset,
            "split": self.split,
            "num_images": len(self.images),
            "fingerprint": self.images.fingerprint,
            "image_size": self.image_size,
            "aspect_buckets": dataclasses.asdict(self.buckets) if self.buckets else None,
            "autoencoder": {
                "name": autoencoder.name,
                "weights_sha256": autoencoder.weights_sha256,
                "dtype": self.autoencoder_dtype,
                "downsampling": autoencoder.downsampling,
                "scale": autoencoder.scale,
                "shift": autoencoder.shift,
            },
        }

    @property
    def image_bytes(self) -> int:
        """Of the moments of one image, the largest."""
        moments = moment_names(stochastic=True, mirrored=self.mirrored)
        return (
            2 * len(moments) * max(math.prod(self.latent_shape(size)) for size in self.latent_sizes)
        )

    @property
    def parts_folder(self) -> Path:
        """Where the work in progress is; readers of data sets do not look there."""
        kind = "buckets" if self.buckets else "square"
        return self.data_dir / f"incomplete.latents.{self.written_split}.{self.image_size}.{kind}"

    def latent_shape(self, latent_size: Size) -> tuple[int, int, int]:
        """(h, w, C)."""
        return (*latent_size, self.autoencoder.channels)

    def config_name(self, latent_size: Size) -> str:
        """The data set's configuration."""
        shape = self.latent_shape(latent_size)
        return latents_config_name(shape, bucket=self.buckets is not None)

    def folder(self, latent_size: Size) -> Path:
        """Where the data set will be, without its version."""
        return self.data_dir / ImagenetLatents.name / self.config_name(latent_size)
