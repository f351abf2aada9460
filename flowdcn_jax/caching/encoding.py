"""From the list of images to their latents: cropped by threads, encoded on all local devices."""

import collections
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from flowdcn_jax.autoencoders import Autoencoder, to_unit_range
from flowdcn_jax.caching.job import Job
from flowdcn_jax.caching.parts import Part, Skipped, check_bad
from flowdcn_jax.data import DataError, randomness
from flowdcn_jax.data.image_files import BadImageError, centre_crop, random_crop
from flowdcn_jax.faults import retried
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, replicated

# Encoded at a time on each device: 16 images of 256x256, 4 of 512x512.  More are hardly faster
# (SD-VAE at 256x240 on an H100, in batches of 32, 16, 8: 36, 56, 55 images a second in float32 and
# 825, 795, 737 in bfloat16) and waste more: each bucket's last batch in a part is filled up.
# Smaller batches for those alone would have to be compiled too, 5 s (bfloat16) to 30 s each.
PIXELS_PER_DEVICE = 2**20

_BATCHES_IN_FLIGHT = 2  # so that the devices never wait for the host
_CROP_SEED = 0


class Cropped(NamedTuple):
    """An image, ready to be encoded."""

    name: str
    pixels: np.ndarray  # uint8 [H, W, 3]
    label: int


class LatentEncoder:
    """Encodes batches of images of any size, compiled once a size."""

    def __init__(self, autoencoder: Autoencoder, *, mirrored: bool, batch_size: int | None):
        """Copies the weights to all local devices.

        Args:
            autoencoder: its `encode` is called.
            mirrored: encode the mirror images too.
            batch_size: images a device; None: as many as have PIXELS_PER_DEVICE.
        """
        self._mesh = make_mesh(devices=jax.local_devices())
        self._batch_size = batch_size
        self._params = jax.device_put(autoencoder.params, replicated(self._mesh))
        self._jitted = _compiled(autoencoder.encode, self._mesh, mirrored)

    def rows(self, height: int, width: int) -> int:
        """Images a batch, on all devices together, for images of height x width pixels."""
        per_device = self._batch_size or max(1, PIXELS_PER_DEVICE // (height * width))
        return per_device * self._mesh.size

    def to_devices(self, images: Sequence[np.ndarray]) -> jax.Array:
        """At most `rows` images, uint8 [H,W,3] of one size, split over the devices.

        A short batch is filled up, so that nothing compiles twice.
        """
        shape = images[0].shape
        batch = np.zeros((self.rows(*shape[:2]), *shape), np.uint8)
        np.stack(images, out=batch[: len(images)])
        return jax.device_put(batch, batch_sharding(self._mesh))

    def encode(self, batch: jax.Array) -> dict[str, jax.Array]:
        """The moments, float16 [rows,H/f,W/f,C], of a batch on the devices; does not wait."""
        return self._jitted(self._params, batch)


@functools.lru_cache(maxsize=8)  # so that encoders of one autoencoder share what is compiled
def _compiled(
    encode: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]], mesh: Mesh, mirrored: bool
) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    def moments(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        images = to_unit_range(images)
        views = {"": images} | ({"_flipped": images[:, :, ::-1]} if mirrored else {})
        # One after the other: the network is compiled once, and holds one view in memory.
        means, stds = jax.lax.map(lambda view: encode(params, view), jnp.stack([*views.values()]))
        named = {}
        for index, suffix in enumerate(views):
            named[f"mean{suffix}"] = means[index].astype(jnp.float16)
            named[f"std{suffix}"] = stds[index].astype(jnp.float16)
        return named

    batches = batch_sharding(mesh)
    return jax.jit(moments, in_shardings=(replicated(mesh), batches), out_shardings=batches)


def read_ahead(
    job: Job, indices: np.ndarray, *, num_threads: int, ahead: int
) -> Iterator[Cropped | Skipped]:
    """`read_cropped` of each index, in order, up to `ahead` before they are due.

    Closing the iterator ends the threads.
    """
    options = grain.ReadOptions(num_threads=min(num_threads, ahead), prefetch_buffer_size=ahead)
    images = grain.MapDataset.source(indices).map(functools.partial(read_cropped, job))
    return iter(images.to_iter_dataset(options))


def read_cropped(job: Job, index: int) -> Cropped | Skipped:
    """Image `index` of a job; the place of a crop belongs to the image, whoever makes it.

    Raises:
        DataError: the machine fails, or the label is out of range.
    """
    index = int(index)
    name = job.images.name(index)
    try:
        image, label = retried(lambda: job.images.read(index), what=name)
        if job.buckets is None:
            pixels = centre_crop(image, job.image_size)
        else:
            height, width = job.buckets.nearest(image.height, image.width)
            place = randomness.uniform(np.array([index]), seed=_CROP_SEED, purpose=randomness.CROP)
            pixels = random_crop(image, height, width, place=float(place[0]))
    except BadImageError as error:
        return Skipped(name, str(error))
    except (MemoryError, OSError) as error:
        reason = str(error) or "out of memory"
        raise DataError(
            f"{name} could not be read now ({reason}): once that is mended, the same command "
            "goes on"
        ) from error
    if not 0 <= label < job.images.num_classes:
        raise DataError(f"{name} has the label {label}; expected 0 .. {job.images.num_classes - 1}")
    return Cropped(name, pixels, label)


def encode_part(
    images: Iterable[Cropped | Skipped],
    encoder: LatentEncoder,
    *,
    skipped: list[Skipped],
    max_bad: int,
    progress: tqdm,
) -> Part:
    """What a part holds of its images.

    Args:
        images: read once, in order.
        encoder: it encodes them.
        skipped: images of other parts; those of this one are added.
        max_bad: images that may be skipped.
        progress: counts the images.

    Raises:
        TooManyBadError: more than `max_bad` are in `skipped`.
        DataError: an image gives values that float16 cannot hold.
    """
    part, encoded = Part(), collections.defaultdict(list)

    def usable() -> Iterator[Cropped]:
        for image in images:
            if isinstance(image, Cropped):
                yield image
                continue
            part.skipped.append(image)
            skipped.append(image)
            progress.update()
            progress.write(f"skipped {image.name}: {image.reason}", file=sys.stderr)
            check_bad(skipped, max_bad)

    for batch, moments in _encoded(_batches(usable(), encoder.rows), encoder):
        moments = {name: np.asarray(array)[: len(batch)] for name, array in moments.items()}
        _check_finite(batch, moments)
        for name in [name for name in moments if name.startswith("mean")]:
            std = moments[name.replace("mean", "std")]
            part.statistics = part.statistics.and_of(moments[name], std)
        labels = np.array([image.label for image in batch], np.int32)
        encoded[moments["mean"].shape[1:3]].append(moments | {"label": labels})
        progress.update(len(batch))
    for size, batches in encoded.items():
        named = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        part.arrays[size] = named
    return part


def _batches(images: Iterable[Cropped], rows: Callable[[int, int], int]) -> Iterator[list[Cropped]]:
    """Images of one size each, `rows` of them; the last of a size are fewer."""
    waiting = collections.defaultdict(list)
    for image in images:
        size = image.pixels.shape[:2]
        waiting[size].append(image)
        if len(waiting[size]) == rows(*size):
            yield waiting.pop(size)
    yield from waiting.values()


def _encoded(
    batches: Iterable[list[Cropped]], encoder: LatentEncoder
) -> Iterator[tuple[list[Cropped], dict[str, jax.Array]]]:
    """Each batch and its moments, which come once the next batches have been started."""
    started = collections.deque()
    for batch in batches:
        pixels = encoder.to_devices([image.pixels for image in batch])
        started.append((batch, encoder.encode(pixels)))
        if len(started) > _BATCHES_IN_FLIGHT:
            yield started.popleft()
    yield from started


def _check_finite(batch: list[Cropped], moments: dict[str, np.ndarray]) -> None:
    finite = np.all([np.isfinite(array).all((1, 2, 3)) for array in moments.values()], axis=0)
    if not finite.all():
        raise DataError(
            f"{batch[finite.argmin()].name}: the autoencoder gives values that float16 cannot "
            "hold; with --autoencoder_dtype=float32 it may not"
        )
