"""Encodes the images of a data set once, for training on their latents.

    python -m flowdcn_jax.tools.cache_latents --dataset=folder:~/photos --image_size=256 \\
        --autoencoder=sd_vae --autoencoder_weights=~/sd-vae-ft-ema --data_dir=~/latents

--dataset is `folder:PATH`, a folder with a subfolder a class, or a TFDS data set that is prepared
in array_record files, such as `imagenet2012` (see docs/data.md).  Images are cropped as ADM does;
with --aspect_buckets each goes to the bucket that is nearest in aspect, for VAR training.  All
local devices encode.  Stopped at any moment, the same command goes on.

Several hosts share the work: the same command on each, with --num_shards=N --shard_index=I and one
--data_dir on a file system that they share.  The last one joins the shares.

An image that cannot be read or decoded is named, skipped and listed in the manifest, the file
metadata.json of the data set; more than --max_bad of them end the command.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from absl import flags

from flowdcn_jax import command
from flowdcn_jax.errors import UserError

_ENCODERS = ("sd_vae", "taesd", "taef1", "taef2")

_DATASET = flags.DEFINE_string(
    "dataset", None, "folder:PATH, or the name of a TFDS data set.", required=True
)
_SPLIT = flags.DEFINE_string(
    "split", "train", "Split of the TFDS data set, or a slice of it; name of what is made."
)
_SOURCE_DIR = command.define_path(
    "source_dir", "Where the TFDS data set is prepared.  Default: --data_dir."
)
_DATA_DIR = command.define_path(
    "data_dir", "Folder of prepared data sets.  Default: $TFDS_DATA_DIR, else that of TFDS."
)
_CLASS_LIST = command.define_path(
    "class_list",
    "File with the names of a folder's classes, a line each, in the order of their labels.  "
    "Default: all subfolders, by name.",
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 256, "Side of the centre crop, or root of the buckets' area, pixels.", 1
)
_AUTOENCODER = flags.DEFINE_enum("autoencoder", None, _ENCODERS, "Which encodes.", required=True)
_WEIGHTS = command.define_path(
    "autoencoder_weights", "Its safetensors file, or the folder that holds it."
)
_DTYPE = flags.DEFINE_enum(
    "autoencoder_dtype", "float32", ("float32", "bfloat16"), "Compute dtype of the encoder."
)
_ASPECT_BUCKETS = flags.DEFINE_bool(
    "aspect_buckets", False, "Cache each image at the nearest of several aspects, not mirrored."
)
_NUM_BUCKETS = flags.DEFINE_integer("num_buckets", 10, "Number of aspects.", 1)
_MIN_ASPECT = flags.DEFINE_float("min_aspect", 0.5, "Width / height of the tallest bucket.", 0)
_MAX_ASPECT = flags.DEFINE_float("max_aspect", 3.0, "Width / height of the widest bucket.", 0)
_SIDE_MULTIPLE = flags.DEFINE_integer(
    "side_multiple", 16, "Sides of buckets are multiples of it, pixels.", 1
)
_MAX_BAD = flags.DEFINE_integer("max_bad", 100, "Images that may be skipped.", 0)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Images a device and batch.  Default: 16 of 256x256, 4 of 512x512.", 1
)
_NUM_THREADS = flags.DEFINE_integer(
    "num_threads", None, "Threads that decode images.  Default: one a CPU.", 1
)
_SHARD_INDEX = flags.DEFINE_integer("shard_index", 0, "This process's share of the work.", 0)
_NUM_SHARDS = flags.DEFINE_integer("num_shards", 1, "Processes that share the work.", 1)


def main() -> int:
    """Returns the exit status."""
    warnings.filterwarnings("ignore", module="PIL")  # of large images and damaged EXIF
    try:
        _cache()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return command.INTERRUPTED
    return 0


def _cache() -> None:
    if _SHARD_INDEX.value >= _NUM_SHARDS.value:
        raise UserError(
            f"--shard_index is {_SHARD_INDEX.value}; expected 0 .. {_NUM_SHARDS.value - 1}, below "
            "--num_shards"
        )
    # Imported here so that --help and usage errors come at once.
    from flowdcn_jax.caching import cache_latents

    job = _job()
    print(f"{len(job.images)} images of {job.images.num_classes} classes in {job.dataset}")
    for note in job.images.notes:
        print(f"note: {note}")
    manifest = cache_latents(
        job,
        batch_size=_BATCH_SIZE.value,
        num_threads=_NUM_THREADS.value or len(os.sched_getaffinity(0)),
        max_bad=_MAX_BAD.value,
        shard_index=_SHARD_INDEX.value,
        num_shards=_NUM_SHARDS.value,
    )
    if manifest is None:
        print("this share is done; the process that ends last joins them all")
    else:
        _report(manifest, job.data_dir)


def _job() -> Any:
    """What the flags ask for."""
    from ml_collections import ConfigDict

    from flowdcn_jax.autoencoders import PUBLISHED_DOWNSAMPLING, load_autoencoder
    from flowdcn_jax.caching import Job
    from flowdcn_jax.data.aspect_buckets import AspectBuckets
    from flowdcn_jax.data.labelled_images import open_labelled_images
    from flowdcn_jax.data.prepared import resolve_data_dir

    buckets = None
    if _ASPECT_BUCKETS.value:
        buckets = AspectBuckets(
            image_size=_IMAGE_SIZE.value,
            count=_NUM_BUCKETS.value,
            min_aspect=_MIN_ASPECT.value,
            max_aspect=_MAX_ASPECT.value,
            side_multiple=_SIDE_MULTIPLE.value,
        )
    autoencoder = dict(
        name=_AUTOENCODER.value,
        weights=_WEIGHTS.value,
        downsampling=PUBLISHED_DOWNSAMPLING,
        dtype=_DTYPE.value,
    )
    data_dir = resolve_data_dir(_DATA_DIR.value)
    images = open_labelled_images(
        _DATASET.value,
        split=_SPLIT.value,
        data_dir=_SOURCE_DIR.value or _DATA_DIR.value,
        output_dir=data_dir,
        class_list=_CLASS_LIST.value and Path(_CLASS_LIST.value),
    )
    return Job(
        dataset=images.source,
        split=_SPLIT.value,
        images=images,
        autoencoder=load_autoencoder(ConfigDict(autoencoder)),
        autoencoder_dtype=_DTYPE.value,
        image_size=_IMAGE_SIZE.value,
        buckets=buckets,
        data_dir=data_dir,
    )


def _report(manifest: dict[str, Any], data_dir: Path) -> None:
    for name, count in manifest["num_examples"].items():
        print(f"{count} images in {data_dir / 'imagenet_latents' / name}")
    if manifest["skipped"]:
        print(f"skipped {len(manifest['skipped'])} images, listed in metadata.json there")


if __name__ == "__main__":
    command.run(main)
