"""Encoding images on all local devices."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowdcn_jax.autoencoders import Autoencoder, to_unit_range
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, replicated

# Encoded at a time on each device: 16 images of 256x256, 4 of 512x512.  More are hardly faster
# (SD-VAE at 256x240 on an H100, in batches of 32, 16, 8: 36, 56, 55 images a second in float32 and
# 825, 795, 737 in bfloat16) and waste more: each bucket's last batch in a part is filled up.
# Smaller batches for those alone would have to be compiled too, 5 s (bfloat16) to 30 s each.
PIXELS_PER_DEVICE = 2**20


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
        self._params = jax.jit(lambda x: x, out_shardings=replicated(self._mesh))(
            autoencoder.params
        )
        self._jitted = jax.jit(
            _make_encode(autoencoder, mirrored=mirrored),
            in_shardings=(replicated(self._mesh), batch_sharding(self._mesh)),
            out_shardings=batch_sharding(self._mesh),
        )

    def rows(self, height: int, width: int) -> int:
        """Images a batch, on all devices together, for images of height x width pixels."""
        per_device = self._batch_size or max(1, PIXELS_PER_DEVICE // (height * width))
        return per_device * self._mesh.size

    def start(self, images: list[np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
        """Begins to encode at most `rows` images, uint8 [H,W,3] of one size.

        A short batch is filled up, so that nothing compiles twice.

        Returns:
            A function that waits and gives the moments, float16 [n,H/f,W/f,C] each.
        """
        count, shape = len(images), images[0].shape
        batch = np.zeros((self.rows(*shape[:2]), *shape), np.uint8)
        np.stack(images, out=batch[:count])
        moments = self.encode(self.to_devices(batch))
        return lambda: {name: np.asarray(array)[:count] for name, array in moments.items()}

    def to_devices(self, batch: np.ndarray) -> jax.Array:
        """Images [rows,H,W,3], split over the devices."""
        return jax.device_put(batch, batch_sharding(self._mesh))

    def encode(self, batch: jax.Array) -> dict[str, jax.Array]:
        """The moments, float16 [rows,H/f,W/f,C], of a batch on the devices; does not wait."""
        return self._jitted(self._params, batch)


def _make_encode(autoencoder: Autoencoder, *, mirrored: bool) -> Callable[[Any, jax.Array], dict]:
    def encode(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        images = to_unit_range(images)
        views = {"": images} | ({"_flipped": images[:, :, ::-1]} if mirrored else {})
        # One after the other: the network is compiled once, and holds one view in memory.
        means, stds = jax.lax.map(
            lambda view: autoencoder.encode(params, view), jnp.stack(list(views.values()))
        )
        moments = {}
        for index, suffix in enumerate(views):
            moments[f"mean{suffix}"] = means[index].astype(jnp.float16)
            moments[f"std{suffix}"] = stds[index].astype(jnp.float16)
        return moments

    return encode


def read_ahead(
    read: Callable[[int], Any], indices: Iterable[int], *, num_threads: int, ahead: int
) -> Iterator[Any]:
    """read(i) for each i of `indices`, in order, read by threads up to `ahead` before they are due.

    Closing the iterator ends the threads.
    """
    pool = ThreadPoolExecutor(num_threads)
    started = collections.deque()
    try:
        for index in indices:
            started.append(pool.submit(read, index))
            if len(started) > ahead:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
