"""Cached latents on disk: the TFDS data set `imagenet_latents`, and how it is written.

`sources.LatentSource` reads it.
"""

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from tqdm import tqdm

from flowdcn_jax.data import prepared
from flowdcn_jax.data.prepared import DataError, DataExistsError
from flowdcn_jax.files import flush

Example = Mapping[str, Any]

# A shard is the unit TFDS holds in memory while latents are written.
SHARD_BYTES = 256 * 2**20


def moment_names(*, stochastic: bool, mirrored: bool) -> tuple[str, ...]:
    """Features of cached latents: of the image, then, if there, the same of its mirror image."""
    moments = ("mean", "std") if stochastic else ("mean",)
    return moments + tuple(f"{name}_flipped" for name in moments) * mirrored


def latents_config_name(latent_shape: tuple[int, int, int], *, bucket: bool = False) -> str:
    """Folder of latents of one shape: "32x32x4", or "bucket_32x30x4" for one of aspect buckets."""
    return "bucket_" * bucket + "x".join(map(str, latent_shape))


class ImagenetLatents(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Moments of an autoencoder's posterior, of each image and of its mirror image.

    `mean`, `std`, `mean_flipped`, `std_flipped` are float16 [h, w, c]; `label` is a class.  There
    is no std of a deterministic autoencoder, and mirror images may be left out.  Its name, in
    TFDS's spelling, is that of the folder on disk, whatever the images are.

    Not a GeneratorBasedBuilder: that one shuffles through temporary files above 1 GB, for which
    it calls TensorFlow.  Order on disk does not matter here, the reader shuffles.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = prepared.NOTHING_TO_DOWNLOAD

    def __init__(
        self,
        shards: Mapping[str, Sequence[Any]],
        features: Mapping[str, Any],
        *,
        metadata: Mapping[str, Any],
        data_dir: Path,
        config_name: str,
    ):
        """`shards`: by split, functions that give the (key, example)s of one file; see TFDS."""
        self._shards = shards
        self._features = features
        self._manifest = metadata
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # TFDS warns of any configuration made at run time
        try:
            super().__init__(
                data_dir=data_dir,
                config=tfds.core.BuilderConfig(name=config_name),
                file_format="array_record",
            )
        finally:
            logging.set_verbosity(verbosity)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self._features),
            metadata=tfds.core.MetadataDict(self._manifest),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Any]]:
        return self._shards

    def _example_writer(self) -> "_UncompressedWriter":
        return _UncompressedWriter()


class _UncompressedWriter:
    """Writes the records of a shard without the compression that TFDS would have chosen.

    Latents are close to noise: compression saves 8 % of the disk, and costs half the time of
    reading a record and four fifths of writing it.
    """

    def write(self, path: os.PathLike, examples: Iterable[tuple[int, bytes]]) -> None:
        """Raises DataError if the disk does not take them."""
        try:
            options = "group_size:1,uncompressed"
            writer = array_record_module.ArrayRecordWriter(os.fspath(path), options)
            with contextlib.closing(writer):
                for _, record in examples:
                    writer.write(record)
        except RuntimeError as error:  # of array_record, such as a full disk
            raise DataError(f"{path} cannot be written: {error}") from error
        flush(path)


def write_latents(
    examples: Iterable[Example],
    *,
    data_dir: str | os.PathLike | None,
    latent_shape: tuple[int, int, int],
    num_classes: int,
    class_names: Sequence[str] | None = None,
    num_examples: int | None = None,
    split: str = "train",
    stochastic: bool = True,
    mirrored: bool = True,
    config_name: str | None = None,
    metadata: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes cached latents as the data set `imagenet_latents`, one configuration a shape.

    Args:
        examples: mappings with `mean`, `std`, `mean_flipped`, `std_flipped` (float arrays
            [h, w, c], unscaled, stored as float16) and `label` (int).  Read once, in order.
        data_dir: where prepared data sets live; None for the convention of TFDS.
        latent_shape: (h, w, c).
        num_classes: labels are 0 .. num_classes - 1.
        class_names: their names, or None.
        num_examples: how many there are; None for `len(examples)`.
        split: name of the split: letters, digits and _.
        stochastic: whether there are `std` and `std_flipped`; False: visits are the mean.
        mirrored: whether there are `mean_flipped` and `std_flipped`; False: no flips in training.
        config_name: the configuration, None for the shape ("32x32x4").
        metadata: kept in the data set's metadata.json; must name the encoder, as
            `prepared.find_encoder` reads it.
        shard_bytes: of a file's latents, at most.

    Returns:
        The folder written.

    Raises:
        DataExistsError: this configuration is there already.
        DataError: an example has another shape, a value that float16 cannot hold, a negative
            std or a label out of range; there are not `num_examples`; `metadata` names no encoder;
            or the disk is full. Nothing was prepared.
    """
    if prepared.split_name(split) != split:
        raise DataError(f"the split is {split!r}; expected a name, not a slice")
    latent_shape = tuple(int(size) for size in latent_shape)
    if len(latent_shape) != 3 or min(latent_shape) < 1:
        raise DataError(f"latent_shape must be (h, w, c), got {latent_shape}")
    prepared.find_encoder(metadata, where="metadata")
    if class_names is not None and len(class_names) != num_classes:
        raise DataError(f"there are {len(class_names)} class_names; num_classes is {num_classes}")
    if num_examples is None:
        if not hasattr(examples, "__len__"):
            raise DataError("examples without a length need num_examples")
        num_examples = len(examples)
    if num_examples < 1:
        raise DataError(f"there must be at least one example, got num_examples={num_examples}")
    data_dir = prepared.resolve_data_dir(data_dir)
    config_name = config_name or latents_config_name(latent_shape)
    existing = prepared.newest_version(data_dir / ImagenetLatents.name / config_name)
    if existing:
        raise DataExistsError(f"latents are prepared already in {existing}")
    moments = {
        name: tfds.features.Tensor(shape=latent_shape, dtype=np.float16, encoding="bytes")
        for name in moment_names(stochastic=stochastic, mirrored=mirrored)
    }
    progress = tqdm(examples, f"latents {split}", total=num_examples, unit="img", mininterval=1)
    checked = _checked_examples(progress, num_examples, moments, num_classes)
    example_bytes = len(moments) * 2 * math.prod(latent_shape)
    num_shards = math.ceil(num_examples * example_bytes / shard_bytes)
    builder = ImagenetLatents(
        {split: _shards(checked, num_examples, num_shards)},
        moments | {"label": prepared.class_label(num_classes, class_names)},
        metadata=metadata,
        data_dir=data_dir,
        config_name=config_name,
    )
    return prepared.write(builder)


def _shards(
    examples: Iterator[tuple[int, Example]], num_examples: int, num_shards: int
) -> list[Callable[[], Iterator[tuple[int, Example]]]]:
    """Functions that take the next examples in turn, for files of nearly equal sizes.

    All but the last take their share; the last runs `examples` to its end and its checks.
    """
    ends = [num_examples * (shard + 1) // num_shards for shard in range(num_shards)]
    sizes = np.diff([0, *ends]).tolist()
    takers = [functools.partial(itertools.islice, examples, size) for size in sizes[:-1]]
    return [*takers, lambda: examples]


def _checked_examples(
    examples: Iterable[Example], num_examples: int, moments: Mapping[str, Any], num_classes: int
) -> Iterator[tuple[int, Example]]:
    """(number, example as stored); DataError if one cannot be, or if there are not so many."""
    count = 0
    for example in examples:
        if count == num_examples:
            raise DataError(f"there are more examples than num_examples={count}")
        stored: dict[str, Any] = {
            name: _as_float16(example[name], feature.shape, f"example {count}: {name}")
            for name, feature in moments.items()
        }
        for name in moments:
            if name.startswith("std") and stored[name].min() < 0:
                raise DataError(f"example {count}: {name} is negative")
        stored["label"] = int(example["label"])
        if not 0 <= stored["label"] < num_classes:
            raise DataError(
                f"example {count}: label {stored['label']} is not 0 .. {num_classes - 1}"
            )
        yield count, stored
        count += 1
    if count != num_examples:
        raise DataError(f"the examples ended after {count} of {num_examples}")


def _as_float16(moment: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    moment = np.asarray(moment)
    if moment.shape != shape:
        raise DataError(f"{name} is {moment.shape}, expected {shape}")
    with np.errstate(over="ignore"):  # the check below says which example it was
        stored = moment.astype(np.float16)
    if not np.isfinite(stored).all():
        raise DataError(f"{name} has values that float16 cannot hold")
    return stored
