"""From the `data` section of a config to a source."""

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from flowdcn_jax.autoencoders import PUBLISHED_DOWNSAMPLING
from flowdcn_jax.data import cifar10_files
from flowdcn_jax.data.aspect_buckets import AspectBuckets
from flowdcn_jax.data.builders import Cifar10Local, ImagenetLatents
from flowdcn_jax.data.errors import DataError, DataNotFoundError
from flowdcn_jax.data.manifest import find_encoder, latents_manifest
from flowdcn_jax.data.prepared import (
    find_prepared,
    known_class_names,
    open_prepared,
    parse_record,
    resolve_data_dir,
)
from flowdcn_jax.data.sources import BucketedSource, LatentSource, PixelSource, Source

_DIGITS_SIZES = range(8, 257)
_DIGITS_MAX_INK = 16.0

_CIFAR10_NAMES = (Cifar10Local.name, "cifar10")  # ours, then TFDS's own
_LATENTS_NAMES = (ImagenetLatents.name,)

_HOW_TO_PREPARE = {
    "cifar10": (
        "prepare it with: python -m flowdcn_jax.tools.prepare_data --dataset=cifar10 "
        "--source=<file or folder> --data_dir={data_dir}"
    ),
    "imagenet_latents": (
        "fill it with: python -m flowdcn_jax.tools.cache_latents --dataset=<name or folder:path> "
        "--autoencoder=<name> --data_dir={data_dir}"
    ),
}


def make_source(
    data_config: ml_collections.ConfigDict, *, channels: int | None = None
) -> Source | BucketedSource:
    """Opens the data set that a config names.

    Args:
        data_config: reads
            `name`: "digits", "cifar10" or "imagenet_latents";
            `data_dir`: folder of prepared data sets, None for the convention of TFDS;
            `split`: "train", "test" or a slice of TFDS such as "train[:1000]";
            `image_size`: side of the images in pixels (digits: any of 8 .. 256; cifar10: 32;
                latents: 8 times their side);
            `random_flip`: show the mirror image in half of the visits;
            `aspect_buckets`: with a `count` of 1 or more, latents that were cached in these buckets
                around `image_size` (imagenet_latents only); see `aspect_buckets.AspectBuckets`.
        channels: chooses among latents of several autoencoders in one folder; None: there are
            those of one.  Unused for pixels.

    Returns:
        The source, for `make_batches`.  CIFAR-10 is decoded into memory (154 MB), latents stay
        on disk.

    Raises:
        DataNotFoundError: the data set is not prepared; the message says how to prepare it.
        DataError: a value out of range, or files that are not this data set.
    """
    name = data_config.name
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; choose from {sorted(SOURCES)}")
    size = data_config.image_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(f"image_size must be a positive integer, got {size!r}")
    if data_config.aspect_buckets.count and name != "latents":
        raise DataError(f"aspect_buckets are for latents, not {name}: count=0")
    return SOURCES[name](data_config, channels)


def aspect_buckets(data_config: ml_collections.ConfigDict) -> AspectBuckets | None:
    """The buckets of the `data` section of a config; None for images of one size.

    Raises:
        DataError: a value out of range.
    """
    if not data_config.aspect_buckets.count:
        return None
    return AspectBuckets(image_size=data_config.image_size, **data_config.aspect_buckets)


def _make_digits(data_config: ml_collections.ConfigDict, channels: int | None) -> PixelSource:
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
        digits.target,
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


def _make_cifar10(data_config: ml_collections.ConfigDict, channels: int | None) -> PixelSource:
    side = cifar10_files.IMAGE_SHAPE[0]
    if data_config.image_size != side:
        raise DataError(f"image_size of cifar10 is {side} pixels, got {data_config.image_size}")
    folders = _prepared_folders("cifar10", _CIFAR10_NAMES, data_config)
    records, info = open_prepared(folders[0], names=_CIFAR10_NAMES, split=data_config.split)
    images, labels = _decode_images(records, info.features)
    return PixelSource(
        images,
        labels,
        num_classes=cifar10_files.NUM_CLASSES,
        class_names=known_class_names(info.features["label"]),
        flips=data_config.random_flip,
        identity=_pixels_identity(images, labels),
    )


def _pixels_identity(images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(labels, np.int32))
    return {"num_examples": len(labels), "sha256": digest.hexdigest()}


def _decode_images(records: Any, features: Any) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 [N, 32, 32, 3], and labels, int32 [N].

    In memory a batch of 256 takes 2 ms; decoded record by record it would take 20 or more.
    """
    compressed = isinstance(features["image"], tfds.features.Image)  # TFDS's own, as PNG
    images = np.empty((len(records), *cifar10_files.IMAGE_SHAPE), np.uint8)
    labels = np.empty(len(records), np.int32)
    for row in range(len(records)):
        feature = parse_record(records[row])
        encoded = feature["image"].bytes_list.value[0]
        if compressed:
            images[row] = np.asarray(Image.open(io.BytesIO(encoded)))
        else:
            images[row] = np.frombuffer(encoded, np.uint8).reshape(cifar10_files.IMAGE_SHAPE)
        labels[row] = feature["label"].int64_list.value[0]
    return images, labels


def _make_imagenet_latents(
    data_config: ml_collections.ConfigDict, channels: int | None
) -> Source | BucketedSource:
    folders = _prepared_folders("imagenet_latents", _LATENTS_NAMES, data_config)
    buckets = aspect_buckets(data_config)
    if buckets is None:
        folder = _latents_of_size(folders, data_config.image_size, channels)
        return _open_latents([folder], data_config)[0]
    return BucketedSource(
        _open_latents(_latents_of_buckets(folders, buckets, channels), data_config)
    )


def _open_latents(folders: list[Path], data_config: ml_collections.ConfigDict) -> list[Source]:
    """The latents in folders that were filled together."""
    opened = [
        open_prepared(folder, names=_LATENTS_NAMES, split=data_config.split) for folder in folders
    ]
    manifest = latents_manifest(folders[0])
    counts = {
        folder.parent.name: len(records)
        for folder, (records, _) in zip(folders, opened, strict=True)
    }
    return [
        LatentSource(
            records,
            info.features,
            class_names=known_class_names(info.features["label"]),
            flips=data_config.random_flip,
            encoder=find_encoder(manifest),
            identity={"settings": manifest["settings"], "num_examples": counts},
        )
        for records, info in opened
    ]


def _latents_of_size(folders: list[Path], image_size: int, channels: int | None) -> Path:
    """The one folder, named `<h>x<w>x<c>/<version>`, with latents of images of this size."""
    side = image_size / PUBLISHED_DOWNSAMPLING
    fitting = [folder for folder in folders if _is_named(folder, f"{side:g}x", channels)]
    if len(fitting) != 1:
        of_channels = "" if channels is None else f" with {channels} channels (model.in_channels)"
        raise DataError(
            f"{len(fitting)} of the latents prepared are of image_size={image_size} (pixels, "
            f"{PUBLISHED_DOWNSAMPLING} times their side){of_channels}: change it, or let data_dir "
            f"be one of {[str(folder) for folder in folders]}"
        )
    return fitting[0]


def _latents_of_buckets(
    folders: list[Path], buckets: AspectBuckets, channels: int | None
) -> list[Path]:
    """The folders of latents of these buckets that hold images, in the order of their sizes."""
    starts = [
        f"bucket_{height // PUBLISHED_DOWNSAMPLING}x{width // PUBLISHED_DOWNSAMPLING}x"
        for height, width in buckets.sizes
    ]
    chosen = [f for start in starts for f in folders if _is_named(f, start, channels)]
    wanted = dataclasses.asdict(buckets)
    if not chosen:
        of_channels = "" if channels is None else f" with {channels} channels (model.in_channels)"
        raise DataNotFoundError(
            f"no latents{of_channels} are cached in the buckets {wanted}; cache them with "
            f"--aspect_buckets. There are {sorted(folder.parent.name for folder in folders)}"
        )
    manifests = [latents_manifest(folder) for folder in chosen]
    for folder, manifest in zip(chosen, manifests, strict=True):
        cached = manifest["settings"].get("aspect_buckets")
        if cached != wanted:
            raise DataError(
                f"{folder} was cached in the buckets {cached}; the config asks for {wanted}"
            )
        if manifest["settings"] != manifests[0]["settings"]:
            raise DataError(
                f"{folder} and {chosen[0]} were cached with different settings, as their "
                "metadata.json say; let data_dir hold those of one"
            )
    found = {folder.parent.name for folder in chosen}
    missing = sorted(manifests[0].get("num_examples", {}).keys() - found)
    if missing:
        raise DataError(f"the latents of the buckets are not all there, {missing} are missing")
    return chosen


def _is_named(folder: Path, start: str, channels: int | None) -> bool:
    """Whether the folder `<h>x<w>x<c>/<version>`, or `bucket_...`, has this start and channels."""
    name = folder.parent.name
    return name.startswith(start) and (channels is None or name.endswith(f"x{channels}"))


def _prepared_folders(
    name: str, tfds_names: tuple[str, ...], data_config: ml_collections.ConfigDict
) -> list[Path]:
    data_dir = resolve_data_dir(data_config.data_dir)
    folders = find_prepared(data_dir, tfds_names)
    if not folders:
        raise DataNotFoundError(
            f"{name} is not prepared in {data_dir} (no {' or '.join(tfds_names)} there); "
            + _HOW_TO_PREPARE[name].format(data_dir=str(data_dir))
        )
    return folders


SOURCES = {
    "digits": _make_digits,
    "cifar10": _make_cifar10,
    "latents": _make_imagenet_latents,
}
