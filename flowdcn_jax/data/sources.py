"""From config.data to a data set: scikit-learn's digits, CIFAR-10, cached latents."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from flowdcn_jax.autoencoders import PUBLISHED_DOWNSAMPLING
from flowdcn_jax.data import cifar10, prepared, randomness
from flowdcn_jax.data.aspect_buckets import AspectBuckets, aspect_buckets
from flowdcn_jax.data.batches import Batch, BucketedSource, DataSource
from flowdcn_jax.data.latents import ImagenetLatents, moment_names
from flowdcn_jax.data.prepared import DataError, DataNotFoundError, Encoder

_DIGITS_SIZES = range(8, 257)
_DIGITS_MAX_INK = 16.0
_CIFAR10_SIZES = range(cifar10.IMAGE_SHAPE[0], 257)
_LATENTS = ImagenetLatents.name


def make_source(
    data_config: ConfigDict, *, channels: int | None = None
) -> DataSource | BucketedSource:
    """Opens the data set that config.data names.

    Args:
        data_config: config.data; its values are of the types and within the ranges that
            configs/default.py gives.
        channels: chooses among latents of several autoencoders in one folder; None: there are
            those of one.  Unused for pixels.

    Returns:
        The data set, for `make_batches`.  CIFAR-10 is decoded into memory (154 MB), latents stay
        on disk.

    Raises:
        DataNotFoundError: the data set is not prepared; the message says how to prepare it.
        DataError: no such data set, one that has no such images, or files that are not this one.
    """
    name = data_config.name
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; choose from {sorted(SOURCES)}")
    if data_config.aspect_buckets.count and name != "latents":
        raise DataError(f"aspect_buckets are for latents, not {name}: count=0")
    return SOURCES[name](data_config, channels)


@dataclasses.dataclass(frozen=True, eq=False)
class PixelSource:
    """8-bit images held in memory; a `DataSource`."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]
    num_classes: int
    class_names: tuple[str, ...] | None
    flips: bool
    identity: dict[str, Any]

    image_dtype = np.dtype(np.uint8)
    encoder = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray, positions: np.ndarray, seed: int) -> Batch:
        """See `DataSource.read`; images are uint8."""
        images = self.images[indices]
        if self.flips:
            mirrored = randomness.random_bits(positions, seed=seed, purpose=randomness.FLIP)
            images[mirrored] = images[mirrored, :, ::-1]
        return {"image": images, "label": self.labels[indices]}


class LatentSource:
    """Cached moments of an autoencoder's posterior, sampled anew at each visit; a `DataSource`.

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
        flips: bool,
        encoder: Encoder,
        identity: dict[str, Any],
    ):
        """Reads from `records`, serialised examples that TFDS wrote with `features`.

        Raises:
            DataError: the features are not those of `ImagenetLatents`, or have no mirror images and
                `flips` wants them.
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
        self.class_names = prepared.known_class_names(features["label"])
        self.flips = flips

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray, positions: np.ndarray, seed: int) -> Batch:
        """See `DataSource.read`; images are float32 latents."""
        count = len(indices)
        moments = np.empty((len(self._moments), count, math.prod(self.image_shape)), np.float16)
        labels = np.empty(count, np.int32)
        mirrored = np.zeros(count, bool)
        if self.flips:
            mirrored = randomness.random_bits(positions, seed=seed, purpose=randomness.FLIP)
        # Record by record: the batched read of array_record starts a thread a shard each call.
        for row, (index, mirror) in enumerate(zip(indices, mirrored, strict=True)):
            feature = prepared.parse_record(self._records[int(index)])
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


def _pixels_identity(images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(labels, np.int32))
    return {"num_examples": len(labels), "sha256": digest.hexdigest()}


def _open_digits(data_config: ConfigDict, channels: int | None) -> PixelSource:
    if data_config.random_flip:
        raise DataError("digits are never flipped (a mirrored digit is none): random_flip=False")
    if data_config.split != "train":
        raise DataError(f"digits have only the split 'train', got {data_config.split!r}")
    size = data_config.image_size
    if size not in _DIGITS_SIZES:
        raise DataError(f"image_size of digits must be 8 .. 256 pixels, got {size}")
    from sklearn.datasets import load_digits  # a second to import, wanted here only

    digits = load_digits()
    return PixelSource(
        np.stack([_resize_digit(image, size) for image in digits.images]),
        digits.target.astype(np.int32),
        num_classes=10,
        class_names=tuple(str(name) for name in digits.target_names),
        flips=False,
        identity=_pixels_identity(digits.images, digits.target),  # whatever Pillow makes of them
    )


def _resize_digit(ink: np.ndarray, size: int) -> np.ndarray:
    """[8, 8] of 0 .. 16, black to white, -> uint8 [size, size, 1]."""
    image = Image.fromarray((ink * (255.0 / _DIGITS_MAX_INK)).astype(np.float32))
    resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)[..., None]  # bicubic overshoots


def _open_cifar10(data_config: ConfigDict, channels: int | None) -> PixelSource:
    size = data_config.image_size
    if size not in _CIFAR10_SIZES:
        raise DataError(f"image_size of cifar10 is 32, or up to 256 resized, got {size}")
    images, labels, class_names = cifar10.read_prepared(data_config.data_dir, data_config.split)
    return PixelSource(
        images if size == cifar10.IMAGE_SHAPE[0] else _upscale(images, size),
        labels,
        num_classes=cifar10.NUM_CLASSES,
        class_names=class_names,
        flips=data_config.random_flip,
        identity=_pixels_identity(images, labels),
    )


def _upscale(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n,h,w,3] -> [n,size,size,3], bicubic: all in memory, 0.6 GB of CIFAR-10 at 64."""
    resized = np.empty((len(images), size, size, 3), np.uint8)
    for index, image in enumerate(images):
        resized[index] = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return resized


def _open_latents(data_config: ConfigDict, channels: int | None) -> DataSource | BucketedSource:
    data_dir = prepared.resolve_data_dir(data_config.data_dir)
    folders = prepared.find_prepared(data_dir, [_LATENTS])
    if not folders:
        raise DataNotFoundError(
            f"latents are not prepared in {data_dir} (no {_LATENTS} there); fill it with: python "
            "-m flowdcn_jax.tools.cache_latents --dataset=<name or folder:path> "
            f"--autoencoder=<name> --data_dir={data_dir}"
        )
    buckets = aspect_buckets(data_config)
    if buckets is None:
        chosen = [_latents_of_size(folders, data_config.image_size, channels)]
        return _open_together(chosen, data_config)[0]
    chosen = _latents_of_buckets(folders, buckets, channels)
    return BucketedSource(_open_together(chosen, data_config))


def _open_together(folders: Sequence[Path], data_config: ConfigDict) -> list[LatentSource]:
    """The latents in folders that were filled together."""
    opened = [
        prepared.open_prepared(folder, names=[_LATENTS], split=data_config.split)
        for folder in folders
    ]
    counts = {
        folder.parent.name: len(records)
        for folder, (records, _) in zip(folders, opened, strict=True)
    }
    manifest = _checked_manifest(folders[0])
    return [
        LatentSource(
            records,
            info.features,
            flips=data_config.random_flip,
            encoder=prepared.find_encoder(manifest),
            identity={"settings": manifest["settings"], "num_examples": counts},
        )
        for records, info in opened
    ]


def _checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the latents in a data set's folder; DataError if it names no encoder."""
    manifest = prepared.read_manifest(folder)
    prepared.find_encoder(manifest, where=f"{folder}/metadata.json")
    return manifest


def _latents_of_size(folders: Sequence[Path], image_size: int, channels: int | None) -> Path:
    """The one folder, named `<h>x<w>x<c>/<version>`, with latents of images of this size."""
    side = image_size / PUBLISHED_DOWNSAMPLING
    fitting = [folder for folder in folders if _is_named(folder, f"{side:g}x", channels)]
    if len(fitting) != 1:
        raise DataError(
            f"{len(fitting)} of the latents prepared are of image_size={image_size} (pixels, "
            f"{PUBLISHED_DOWNSAMPLING} times their side){_of_channels(channels)}: change it, or "
            f"let data_dir be one of {[str(folder) for folder in folders]}"
        )
    return fitting[0]


def _latents_of_buckets(
    folders: Sequence[Path], buckets: AspectBuckets, channels: int | None
) -> list[Path]:
    """The folders of latents of these buckets that hold images, in the order of their sizes."""
    starts = [
        f"bucket_{height // PUBLISHED_DOWNSAMPLING}x{width // PUBLISHED_DOWNSAMPLING}x"
        for height, width in buckets.sizes
    ]
    chosen = [f for start in starts for f in folders if _is_named(f, start, channels)]
    wanted = dataclasses.asdict(buckets)
    if not chosen:
        raise DataNotFoundError(
            f"no latents{_of_channels(channels)} are cached in the buckets {wanted}; cache them "
            f"with --aspect_buckets. There are {sorted(folder.parent.name for folder in folders)}"
        )
    manifest = _checked_manifest(chosen[0])
    for folder in chosen:
        settings = _checked_manifest(folder)["settings"]
        cached = settings.get("aspect_buckets")
        if cached != wanted:
            raise DataError(
                f"{folder} was cached in the buckets {cached}; the config asks for {wanted}"
            )
        if settings != manifest["settings"]:
            raise DataError(
                f"{folder} and {chosen[0]} were cached with different settings, as their "
                "metadata.json say; let data_dir hold those of one"
            )
    found = {folder.parent.name for folder in chosen}
    missing = sorted(manifest.get("num_examples", {}).keys() - found)
    if missing:
        raise DataError(f"the latents of the buckets are not all there, {missing} are missing")
    return chosen


def _is_named(folder: Path, start: str, channels: int | None) -> bool:
    """Whether the folder `<h>x<w>x<c>/<version>`, or `bucket_...`, has this start and channels."""
    name = folder.parent.name
    return name.startswith(start) and (channels is None or name.endswith(f"x{channels}"))


def _of_channels(channels: int | None) -> str:
    return "" if channels is None else f" with {channels} channels (model.in_channels)"


SOURCES = {"digits": _open_digits, "cifar10": _open_cifar10, "latents": _open_latents}
"""The data sets by the names that config.data.name takes; `make_source` opens one."""
