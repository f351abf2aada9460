"""What a training step reads: whether the data fit the model, and the stream of global batches."""

import collections
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from flowdcn_jax import data
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.runs.sharding import batch_sharding

DEVICE_PREFETCH = 2  # batches on the devices ahead of the step


def check_source(config, source) -> None:
    """The data set must give what the model takes.

    Raises:
        ConfigError: a shape or the number of classes differs.
    """
    buckets = data.aspect_buckets(config.data)
    sizes = buckets.sizes if buckets else [(config.data.image_size,) * 2]
    stride = config.autoencoder.downsampling
    expected = [
        (height // stride, width // stride, config.model.in_channels) for height, width in sizes
    ]
    for bucket in data.buckets_of(source):
        if tuple(bucket.image_shape) not in expected:
            raise ConfigError(
                f"config.data.name={config.data.name!r} gives arrays of shape "
                f"{tuple(bucket.image_shape)}; the model expects "
                f"{' or '.join(map(str, expected))} (data.image_size and data.aspect_buckets / "
                "autoencoder.downsampling, model.in_channels)"
            )
    if source.num_classes != config.model.num_classes:
        raise ConfigError(
            f"config.model.num_classes is {config.model.num_classes}; expected "
            f"{source.num_classes}, as in the data set {config.data.name!r}"
        )


def batch_shapes(config, source, mesh: Mesh) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """The global batches of the stream, one a shape of images: their shapes and shardings."""
    rows, sharding = config.train.batch_size, batch_sharding(mesh)

    def batch(bucket) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (rows, *bucket.image_shape)
        return {
            "image": jax.ShapeDtypeStruct(shape, bucket.image_dtype, sharding=sharding),
            "label": jax.ShapeDtypeStruct((rows,), np.int32, sharding=sharding),
        }

    return [batch(bucket) for bucket in data.buckets_of(source)]


def batches(config, source, mesh: Mesh, *, start_step: int) -> Iterator[dict[str, jax.Array]]:
    """The stream of global batches from a step on, on the devices."""
    local_batches = data.make_batches(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
        prefetch_batches=config.data.prefetch_batches,
    )
    return on_devices(local_batches, mesh)


def on_devices(local_batches: Iterator[data.Batch], mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Global batches on the devices, DEVICE_PREFETCH of them ahead, from each process's rows."""
    sharding = batch_sharding(mesh)
    ahead = collections.deque()
    for arrays in local_batches:
        ahead.append(
            {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}
        )
        if len(ahead) > DEVICE_PREFETCH:
            yield ahead.popleft()
