"""Data sets that are prepared once, as TFDS builders that write ArrayRecord files.

Neither writing nor reading needs TensorFlow.  TFDS writes into a folder `incomplete.*` and
renames it when all is there, so an interrupted preparation leaves nothing that looks prepared.
"""

import contextlib
import functools
import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from tqdm import tqdm

from flowdcn_jax.data import cifar10_files
from flowdcn_jax.data.errors import DataError, DataExistsError
from flowdcn_jax.data.manifest import find_encoder
from flowdcn_jax.data.prepared import newest_version, resolve_data_dir, split_name
from flowdcn_jax.data.sources import moment_names
from flowdcn_jax.files import flush

Example = Mapping[str, Any]

# A shard is the unit TFDS holds in memory while latents are written.
_SHARD_BYTES = 256 * 2**20

# Else TFDS 4.9.10 looks for checksums with the package importlib_resources, which it does not
# declare and so may not be there.
_NOTHING_TO_DOWNLOAD: Mapping[str, Any] = {}


class Cifar10Local(tfds.core.GeneratorBasedBuilder):
    """CIFAR-10 from files at hand: `image` uint8 [32, 32, 3], `label` 0 .. 9."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = _NOTHING_TO_DOWNLOAD

    def __init__(
        self,
        *,
        splits: Mapping[str, cifar10_files.SplitFiles] | None = None,
        data_dir: str | os.PathLike | None = None,
        config: None = None,
        version: str | None = None,
    ):
        """`splits` are the files to prepare from; reading what is prepared needs none."""
        self._splits = dict(splits or {})
        super().__init__(
            data_dir=data_dir, config=config, version=version, file_format="array_record"
        )

    def _info(self) -> tfds.core.DatasetInfo:
        names = self._splits["train"].class_names if "train" in self._splits else None
        label = tfds.features.ClassLabel(names=names, num_classes=None if names else 10)
        image = tfds.features.Tensor(
            shape=cifar10_files.IMAGE_SHAPE, dtype=np.uint8, encoding="bytes"
        )
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Example]]]:
        if not self._splits:
            raise DataError("Cifar10Local was made without files to prepare from")
        return {name: self._generate_examples(name) for name in self._splits}

    def _generate_examples(self, name: str) -> Iterator[tuple[int, Example]]:
        files = self._splits[name]
        images = _with_progress(files.read(), f"cifar10 {name}", files.count)
        for key, (image, label) in enumerate(images):
            yield key, {"image": image, "label": label}


class ImagenetLatents(tfds.core.ShardBasedBuilder):
    """Moments of an autoencoder's posterior, of each image and of its mirror image.

    `mean`, `std`, `mean_flipped`, `std_flipped` are float16 [h, w, c]; `label` is a class.  There
    is no std of a deterministic autoencoder, and mirror images may be left out.

    Not a GeneratorBasedBuilder: that one shuffles through temporary files above 1 GB, for which
    it calls TensorFlow.  Order on disk does not matter here, the reader shuffles.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = _NOTHING_TO_DOWNLOAD

    def __init__(
        self,
        *,
        examples: Iterable[Example] = (),
        num_examples: int = 0,
        split: str = "train",
        latent_shape: tuple[int, int, int] = (32, 32, 4),
        moments: Sequence[str] = moment_names(stochastic=True, mirrored=True),
        num_classes: int = 1000,
        class_names: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        data_dir: str | os.PathLike | None = None,
        config: str | None = None,
        version: str | None = None,
    ):
        """Use `write_latents`.  `config` is set from `latent_shape` if None."""
        self._examples = examples
        self._num_examples = num_examples
        self._split = split
        self._latent_shape = latent_shape
        self._moments = moments
        self._num_classes = num_classes
        self._class_names = class_names
        self._manifest = metadata
        config = tfds.core.BuilderConfig(name=config or latents_config_name(latent_shape))
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # TFDS warns of any configuration made at run time
        try:
            super().__init__(
                data_dir=data_dir, config=config, version=version, file_format="array_record"
            )
        finally:
            logging.set_verbosity(verbosity)

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            name: tfds.features.Tensor(shape=self._latent_shape, dtype=np.float16, encoding="bytes")
            for name in self._moments
        }
        names = self._class_names
        features["label"] = tfds.features.ClassLabel(
            names=names, num_classes=None if names else self._num_classes
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self._manifest) if self._manifest else None,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, Sequence[Any]]:
        if not self._num_examples:
            raise DataError("ImagenetLatents was made without examples; call write_latents")
        example_bytes = len(self._moments) * 2 * math.prod(self._latent_shape)
        num_shards = math.ceil(self._num_examples * example_bytes / _SHARD_BYTES)
        ends = [self._num_examples * (shard + 1) // num_shards for shard in range(num_shards)]
        sizes = np.diff([0, *ends]).tolist()
        checked = self._checked_examples()
        # All but the last take their share; the last runs `checked` to its end and its checks.
        shards = [functools.partial(itertools.islice, checked, size) for size in sizes[:-1]]
        return {self._split: [*shards, lambda: checked]}

    def _example_writer(self) -> "_UncompressedWriter":
        return _UncompressedWriter()

    def _checked_examples(self) -> Iterator[tuple[int, Example]]:
        count = 0
        examples = _with_progress(self._examples, f"latents {self._split}", self._num_examples)
        for key, example in enumerate(examples):
            if key == self._num_examples:
                raise DataError(f"there are more examples than num_examples={key}")
            yield key, self._checked(example, key)
            count += 1
        if count != self._num_examples:
            raise DataError(f"the examples ended after {count} of {self._num_examples}")

    def _checked(self, example: Example, key: int) -> Example:
        """The example as stored: float16 moments and an int label; DataError if it cannot be."""
        checked: dict[str, Any] = {}
        for name in self._moments:
            moment = np.asarray(example[name])
            if moment.shape != self._latent_shape:
                raise DataError(
                    f"example {key}: {name} is {moment.shape}, expected {self._latent_shape}"
                )
            with np.errstate(over="ignore"):  # the check below says which example it was
                checked[name] = moment.astype(np.float16)
            if not np.isfinite(checked[name]).all():
                raise DataError(f"example {key}: {name} has values that float16 cannot hold")
            if name.startswith("std") and checked[name].min() < 0:
                raise DataError(f"example {key}: {name} is negative")
        label = int(example["label"])
        if not 0 <= label < self._num_classes:
            raise DataError(f"example {key}: label {label} is not 0 .. {self._num_classes - 1}")
        return {**checked, "label": label}


class _UncompressedWriter:
    """Writes the records of a shard without the compression that TFDS would have chosen.

    Latents are close to noise: compression saves 8 % of the disk, and costs half the time of
    reading a record and four fifths of writing it.
    """

    def write(self, path: os.PathLike, examples: Iterable[tuple[int, bytes]]) -> None:
        """Raises DataError if the disk does not take them."""
        try:
            writer = array_record_module.ArrayRecordWriter(
                os.fspath(path), "group_size:1,uncompressed"
            )
            try:
                for _, record in examples:
                    writer.write(record)
            finally:
                writer.close()
        except RuntimeError as error:  # of array_record, such as a full disk
            raise DataError(f"{path} cannot be written: {error}") from error
        flush(path)


def latents_config_name(latent_shape: tuple[int, int, int], *, bucket: bool = False) -> str:
    """Folder of latents of one shape: "32x32x4", or "bucket_32x30x4" for one of aspect buckets."""
    return "bucket_" * bucket + "x".join(map(str, latent_shape))


def prepare_cifar10(
    sources: Sequence[str | Path], *, data_dir: str | os.PathLike | None
) -> tuple[Path, bool]:
    """Prepares CIFAR-10 from files; see `cifar10_files.find_splits` for their forms.

    Args:
        sources: files or folders.
        data_dir: where prepared data sets live; None for the convention of TFDS.

    Returns:
        (folder, written): where it is, and False if it was there already.

    Raises:
        DataNotFoundError, DataError: the sources do not hold CIFAR-10; nothing was prepared.
    """
    data_dir = resolve_data_dir(data_dir)
    existing = newest_version(data_dir / Cifar10Local.name)
    if existing:
        return existing, False
    builder = Cifar10Local(splits=cifar10_files.find_splits(sources), data_dir=data_dir)
    return _prepare(builder), True


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
            `manifest.find_encoder` reads it.

    Returns:
        The folder written.

    Raises:
        DataExistsError: this configuration is there already.
        DataError: an example has another shape, a value that float16 cannot hold, a negative
            std or a label out of range; there are not `num_examples`; `metadata` names no encoder;
            or the disk is full. Nothing was prepared.
    """
    if split_name(split) != split:
        raise DataError(f"the split is {split!r}; expected a name, not a slice")
    latent_shape = tuple(int(size) for size in latent_shape)
    if len(latent_shape) != 3 or min(latent_shape) < 1:
        raise DataError(f"latent_shape must be (h, w, c), got {latent_shape}")
    find_encoder(metadata, where="metadata")
    if class_names is not None and len(class_names) != num_classes:
        raise DataError(f"there are {len(class_names)} class_names; num_classes is {num_classes}")
    if num_examples is None:
        if not hasattr(examples, "__len__"):
            raise DataError("examples without a length need num_examples")
        num_examples = len(examples)
    if num_examples < 1:
        raise DataError(f"there must be at least one example, got num_examples={num_examples}")
    data_dir = resolve_data_dir(data_dir)
    config_name = config_name or latents_config_name(latent_shape)
    existing = newest_version(data_dir / ImagenetLatents.name / config_name)
    if existing:
        raise DataExistsError(f"latents are prepared already in {existing}")
    builder = ImagenetLatents(
        examples=examples,
        num_examples=num_examples,
        split=split,
        latent_shape=latent_shape,
        moments=moment_names(stochastic=stochastic, mirrored=mirrored),
        num_classes=num_classes,
        class_names=class_names,
        metadata=metadata,
        data_dir=data_dir,
        config=config_name,
    )
    return _prepare(builder)


def _with_progress(examples: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return tqdm(examples, desc=description, total=total, unit="img", mininterval=1)


def _prepare(builder: tfds.core.DatasetBuilder) -> Path:
    tfds.disable_progress_bar()  # the builders show their own, which know the total
    # TFDS prints that it downloads, though nothing is fetched; the commands say what they made.
    builder._log_download_bytes = builder._log_download_done = lambda: None
    with tempfile.TemporaryDirectory() as downloads:  # else TFDS leaves an empty folder
        builder.download_and_prepare(download_dir=downloads)
    folder = Path(builder.data_dir)
    for path in folder.iterdir():
        flush(path)
    with contextlib.suppress(OSError):  # some network file systems cannot do this with folders
        flush(folder)
        flush(folder.parent)
    return folder
