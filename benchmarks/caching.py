"""How near caching comes to the encoder's own rate, with SD-VAE's architecture and random weights.

    python -m benchmarks.caching --out=docs/caching.json

The encoder's own rate: one batch, already on the devices, encoded again and again.  Caching: the
whole way from JPEG files of 500x375 to the TFDS data set.  Both count an image and its mirror image
as one.  Compilation is left out: the second use finds what the first has compiled.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from benchmarks.random_autoencoder import random_kl
from flowdcn_jax import command
from flowdcn_jax.autoencoders import Autoencoder, kl
from flowdcn_jax.caching import Job, cache_latents
from flowdcn_jax.caching.encoding import LatentEncoder
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.data.labelled_images import FolderImages
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.precision import compute_dtype

_IMAGES = flags.DEFINE_integer("images", 4096, "Images to cache.", 1)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the crop, pixels.", 8)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images a device and batch.", 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Compute dtype.")
_THREADS = flags.DEFINE_integer("num_threads", None, "Threads that decode; default: one a CPU.", 1)
_OUT = command.define_path("out", "JSON file to write.")

_SD_VAE = kl.KLSizes(
    image_channels=3,
    latent_channels=4,
    widths=(128, 256, 512, 512),
    layers_per_block=2,
    norm_groups=32,
)
_PHOTO_SIZE = (500, 375)  # a typical one of ImageNet
_DIFFERENT_PHOTOS = 200  # the others are links to these
_ENCODER_RUNS = 5


def main() -> None:
    out = file_to_write(_OUT)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        _write_photos(Path(folder) / "photos")
        autoencoder = random_kl(_SD_VAE, dtype=compute_dtype(_DTYPE.value))
        encoder_rate = _encoder_rate(autoencoder)
        print(f"encoder alone: {encoder_rate:.1f} images/s", flush=True)
        caching_rate = _caching_rate(autoencoder, Path(folder), machine["cores"])
    print(f"caching: {caching_rate:.1f} images/s, {caching_rate / encoder_rate:.0%} of it")
    report = {
        "machine": machine,
        "images": _IMAGES.value,
        "image_size": _IMAGE_SIZE.value,
        "dtype": _DTYPE.value,
        "encoder_images_per_s": encoder_rate,
        "caching_images_per_s": caching_rate,
        "share": caching_rate / encoder_rate,
    }
    write_json(out, report)


def _write_photos(folder: Path) -> None:
    """JPEGs as large, in bytes and pixels, as photos are."""
    (folder / "class").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(min(_IMAGES.value, _DIFFERENT_PHOTOS)):
        coarse = generator.integers(0, 256, (94, 125, 3), np.uint8)
        image = Image.fromarray(coarse).resize(_PHOTO_SIZE, Image.Resampling.BICUBIC)
        image.save(folder / "class" / f"{index:06d}.jpg", quality=90)
    for index in range(_DIFFERENT_PHOTOS, _IMAGES.value):
        original = folder / "class" / f"{index % _DIFFERENT_PHOTOS:06d}.jpg"
        (folder / "class" / f"{index:06d}.jpg").symlink_to(original)


def _encoder_rate(autoencoder: Autoencoder) -> float:
    """Images a second of the compiled encoder."""
    encoder = LatentEncoder(autoencoder, mirrored=True, batch_size=_BATCH_SIZE.value)
    size = (_IMAGE_SIZE.value, _IMAGE_SIZE.value)
    rows = encoder.rows(*size)
    images = np.random.default_rng(0).integers(0, 256, (rows, *size, 3), np.uint8)
    batch = encoder.to_devices(images)
    means = np.asarray(encoder.encode(batch)["mean"], np.float32)
    assert np.isfinite(means).all() and means.std() > 0.01, "the encoder's output does not vary"
    start_s = time.perf_counter()
    results = [encoder.encode(batch) for _ in range(_ENCODER_RUNS)]
    jax.block_until_ready(results)
    return _ENCODER_RUNS * rows / (time.perf_counter() - start_s)


def _caching_rate(autoencoder: Autoencoder, folder: Path, cores: int) -> float:
    """Images a second from the files to the data set."""
    job = Job(
        dataset="photos",
        split="train",
        images=FolderImages(folder / "photos"),
        autoencoder=autoencoder,
        autoencoder_dtype=_DTYPE.value,
        image_size=_IMAGE_SIZE.value,
        buckets=None,
        data_dir=folder / "data",
    )
    start_s = time.perf_counter()
    cache_latents(
        job,
        batch_size=_BATCH_SIZE.value,
        num_threads=_THREADS.value or cores,
        max_bad=0,
        shard_index=0,
        num_shards=1,
    )
    return _IMAGES.value / (time.perf_counter() - start_s)


if __name__ == "__main__":
    command.run(main)
