"""What every autoencoder offers, and the pictures made with it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PUBLISHED_DOWNSAMPLING = 8  # image pixels a latent pixel, each side, of all published ones here
LATENT_PREVIEW_RANGE = 3.0  # scaled latents have a standard deviation near 1

# Decoded at a time on each device: 16 images of 256x256, 4 of 512x512, 1 of 1024x1024.
PIXELS_PER_SLICE = 2**20


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Between images and the space that the model works in: x = (latents - shift) * scale.

    `encode` and `decode` are pure and can be compiled. Give them `params` as an argument, put on
    the devices once: as they are here, in host memory, every call would copy them there.

    Attributes:
        name: of config.autoencoder.
        downsampling: image pixels a latent pixel, each side.
        channels: of the latents; None: any number.
        scale: factor that brings latents near unit variance.
        shift: taken from the latents before that.
        params: nested dicts of float32 NumPy arrays; {} where there is nothing to load.
        weights_sha256: of the weight files' bytes, one file after the other; None without files.
        encode: (params, images [B,H,W,3] float32 in [-1,1]) -> (mean, std), unscaled latents
            [B,H/f,W/f,C] float32; std is zero where the autoencoder is deterministic.
        decode: (params, x [B,h,w,C] in the model's space) -> images [B,h*f,w*f,3], float32 in
            [-1,1].
    """

    name: str
    downsampling: int
    channels: int | None
    scale: float
    shift: float
    params: Any
    weights_sha256: str | None
    encode: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    decode: Callable[[Any, jax.Array], jax.Array]


def to_unit_range(images: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [-1,1]; latents (floats) pass as they are."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1.0
    return images.astype(jnp.float32)


def decode_pixels(x: jax.Array) -> jax.Array:
    """[-1,1] float [B,H,W,C] -> uint8 [B,H,W,C]."""
    return jnp.round(jnp.clip(x * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def preview_latents(x: jax.Array) -> jax.Array:
    """Latents [B,h,w,C] -> [B,h,w,3] in [-1,1]: three channels, +-3 filling the range."""
    channels = jnp.minimum(jnp.arange(3), x.shape[-1] - 1)
    return jnp.clip(x[..., channels] / LATENT_PREVIEW_RANGE, -1, 1)


def decode_images(autoencoder: Autoencoder, params: Any, x: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Pictures of x, uint8, in slices of at most PIXELS_PER_SLICE a device.

    Rows are decoded on the device that holds them. To be called under jit.

    Args:
        autoencoder: its `decode` is called.
        params: the autoencoder's, on the devices.
        x: [B,h,w,C] in the model's space, split over all axes of `mesh`; B is a multiple of the
            number of devices.
        mesh: the devices.
    """
    rows, shape = x.shape[0] // mesh.size, x.shape[1:]
    pixels = shape[0] * shape[1] * autoencoder.downsampling**2
    num_slices = math.ceil(rows / max(1, PIXELS_PER_SLICE // pixels))
    slice_rows = math.ceil(rows / num_slices)
    filled = num_slices * slice_rows  # rows of a device, with zeros at the end

    x = x.reshape(mesh.size, rows, *shape)
    x = jnp.pad(x, [(0, 0), (0, filled - rows)] + [(0, 0)] * len(shape))
    x = x.reshape(mesh.size, num_slices, slice_rows, *shape).swapaxes(0, 1)
    x = x.reshape(num_slices, mesh.size * slice_rows, *shape)
    by_row = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    x = jax.lax.with_sharding_constraint(x, by_row)
    images = jax.lax.map(lambda part: decode_pixels(autoencoder.decode(params, part)), x)

    shape = images.shape[2:]
    images = images.reshape(num_slices, mesh.size, slice_rows, *shape).swapaxes(0, 1)
    return images.reshape(mesh.size, filled, *shape)[:, :rows].reshape(mesh.size * rows, *shape)
