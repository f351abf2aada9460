"""Sources: a data set that reads any set of examples, with randomness fixed by position."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from flowdcn_jax.data import randomness
from flowdcn_jax.data.errors import DataError
from flowdcn_jax.data.manifest import Encoder
from flowdcn_jax.data.prepared import parse_record

Batch = dict[str, np.ndarray]  # {"image": [n, H, W, C], "label": int32 [n]}


def moment_names(*, stochastic: bool, mirrored: bool) -> tuple[str, ...]:
    """Features of cached latents: of the image, then, if there, the same of its mirror image."""
    moments = ("mean", "std") if stochastic else ("mean",)
    return moments + tuple(f"{name}_flipped" for name in moments) * mirrored


class Source(Protocol):
    """What `make_batches` needs of a data set, and what a training run may ask of it.

    Attributes:
        image_shape: (H, W, C) of one example.
        image_dtype: of `image` in a batch.
        num_classes: number of classes; labels are 0 .. num_classes - 1.
        class_names: their names in that order, or None where the data set holds none.
        flips: whether half of the visits show the mirror image.
        encoder: what made the latents; None for pixels.
        identity: what tells the data set from others, in the types of JSON.
    """

    image_shape: tuple[int, int, int]
    image_dtype: np.dtype
    num_classes: int
    class_names: tuple[str, ...] | None
    flips: bool
    encoder: Encoder | None
    identity: dict[str, Any]

    def __len__(self) -> int:
        """Number of examples in one epoch."""
        ...

    def read(self, indices: np.ndarray, positions: np.ndarray, seed: int) -> Batch:
        """Reads a batch; thread-safe.

        Args:
            indices: int64 [n], which examples (0 .. len - 1).
            positions: int64 [n], where each stands in the stream.  Together with `seed` it
                decides all that is random about the example.
            seed: integer in 0 .. 2**63 - 1.

        Returns:
            {"image": uint8 pixels 0 .. 255 or float32 latents, shifted and
             scaled, [n, H, W, C];
             "label": int32 [n]}.
        """
        ...


class BucketedSource:
    """Data sets of several shapes, of which each batch holds one.

    Attributes:
        buckets: the data sets.
        num_classes: see `Source`; the same in all buckets, like the others.
        class_names: see `Source`.
        flips: see `Source`.
        encoder: see `Source`.
        identity: see `Source`; of all buckets together.
    """

    def __init__(self, buckets: Sequence[Source]):
        """`buckets`: at least one, with the same classes, none empty."""
        self.buckets = tuple(buckets)
        self.num_classes = buckets[0].num_classes
        self.class_names = buckets[0].class_names
        self.flips = buckets[0].flips
        self.encoder = buckets[0].encoder
        self.identity = buckets[0].identity

    def __len__(self) -> int:
        """Number of examples in one epoch, of all buckets."""
        return sum(map(len, self.buckets))


def buckets_of(source: Source | BucketedSource) -> tuple[Source, ...]:
    """The data sets of one shape each that `source` consists of."""
    return source.buckets if isinstance(source, BucketedSource) else (source,)


class PixelSource:
    """8-bit images held in memory."""

    image_dtype = np.dtype(np.uint8)
    encoder = None

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        num_classes: int,
        class_names: tuple[str, ...] | None,
        flips: bool,
        identity: dict[str, Any],
    ):
        """Holds (does not copy) `images`, uint8 [N, H, W, C], and `labels`, int [N]."""
        self._images = images
        self._labels = labels.astype(np.int32)
        self.image_shape = tuple(images.shape[1:])
        self.num_classes = num_classes
        self.class_names = class_names
        self.flips = flips
        self.identity = identity

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: np.ndarray, positions: np.ndarray, seed: int) -> Batch:
        """See `Source.read`; images are uint8."""
        images = self._images[indices]
        if self.flips:
            mirrored = randomness.random_bits(positions, seed=seed, purpose=randomness.FLIP)
            images[mirrored] = images[mirrored, :, ::-1]
        return {"image": images, "label": self._labels[indices]}


class LatentSource:
    """Cached moments of an autoencoder's posterior, sampled anew at each visit.

    A visit draws x = (mean + std * noise - shift) * scale, noise ~ N(0, 1) in float32, with the
    encoder's shift and scale; with `flips` half of the visits use the moments of the mirror image.
    Latents of a deterministic autoencoder have no std, and a visit is (mean - shift) * scale.
    """

    image_dtype = np.dtype(np.float32)

    def __init__(
        self,
        records: Sequence[bytes],
        features: Any,
        *,
        class_names: tuple[str, ...] | None,
        flips: bool,
        encoder: Encoder,
        identity: dict[str, Any],
    ):
        """Reads from records that TFDS wrote.

        Args:
            records: serialised examples, random access, thread-safe.
            features: the `tfds.features.FeaturesDict` they were written with.
            class_names: names of the classes, or None.
            flips: whether half of the visits use the mirror image.
            encoder: what made them; see `manifest.find_encoder`.
            identity: see `Source`.

        Raises:
            DataError: the features are not those of `builders.ImagenetLatents`, or have no mirror
                images and `flips` wants them.
        """
        self._stochastic = "std" in features
        mirrored = "mean_flipped" in features
        names = moment_names(stochastic=self._stochastic, mirrored=mirrored)
        self.image_shape = _latent_shape(features, names)
        if flips and not mirrored:
            raise DataError("these latents were cached without mirror images: random_flip=False")
        half = len(names) // 2 if mirrored else len(names)
        self._moments, self._mirrored_moments = names[:half], names[half:]
        self._records = records
        self.encoder = encoder
        self.identity = identity
        self.num_classes = int(features["label"].num_classes)
        self.class_names = class_names
        self.flips = flips

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray, positions: np.ndarray, seed: int) -> Batch:
        """See `Source.read`; images are float32 latents."""
        count = len(indices)
        moments = np.empty((len(self._moments), count, math.prod(self.image_shape)), np.float16)
        labels = np.empty(count, np.int32)
        mirrored = np.zeros(count, bool)
        if self.flips:
            mirrored = randomness.random_bits(positions, seed=seed, purpose=randomness.FLIP)
        # Record by record: the batched read of array_record starts a thread a shard each call.
        for row, (index, mirror) in enumerate(zip(indices, mirrored, strict=True)):
            feature = parse_record(self._records[int(index)])
            for moment, name in enumerate(self._mirrored_moments if mirror else self._moments):
                encoded = feature[name].bytes_list.value[0]
                moments[moment, row] = np.frombuffer(encoded, np.float16)
            labels[row] = feature["label"].int64_list.value[0]
        mean, *std = moments.reshape(-1, count, *self.image_shape)
        if self._stochastic:
            latents = np.empty(mean.shape, np.float32)
            randomness.fill_standard_normal(latents, positions, seed=seed)
            latents *= std[0]
            latents += mean
        else:
            latents = mean.astype(np.float32)
        latents -= np.float32(self.encoder.shift)
        latents *= np.float32(self.encoder.scale)
        return {"image": latents, "label": labels}


def _latent_shape(features: Any, names: Sequence[str]) -> tuple[int, int, int]:
    """The one (h, w, c) of all moments; DataError if they differ or are missing."""
    missing = [name for name in (*names, "label") if name not in features]
    if missing:
        raise DataError(f"latents lack the features {missing}; they have {sorted(features)}")
    found = {name: (tuple(features[name].shape), features[name].np_dtype) for name in names}
    shapes = {shape for shape, _ in found.values()}
    dtypes = {np.dtype(dtype) for _, dtype in found.values()}
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 3 or None in shape or dtypes != {np.dtype(np.float16)}:
        raise DataError(f"latents must be float16 [h, w, c], all of one shape; found {found}")
    return shape
