"""Training's step, and what stands in for it where there is no GPU."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowdcn_jax.models import abstract_model, apply_model
from flowdcn_jax.runs.sharding import batch_sharding
from flowdcn_jax.runs.state import abstract_state, initial_state
from flowdcn_jax.training.step import make_train_step

Step = Callable[[dict[str, jax.Array]], Any]  # of a batch on the devices; returns when it is done


def stand_in(seconds: float) -> Step:
    """What takes the training step's place: like it, it leaves the CPUs to the reader."""
    return lambda batch: time.sleep(seconds)


def training_step(config: ConfigDict, mesh: Mesh) -> Step:
    """Trains on a batch, and gives its metrics once that is done; the first call compiles."""
    train_step, state = make_train_step(config, mesh), initial_state(config, mesh)

    def run(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        nonlocal state
        state, metrics = jax.block_until_ready(train_step(state, batch))
        return metrics

    return run


def batch_shapes(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of square latents and labels, split over the devices."""
    rows, side = config.train.batch_size, config.data.image_size // config.autoencoder.downsampling
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    image = (rows, side, side, config.model.in_channels)
    return {"image": struct(image, jnp.float32), "label": struct((rows,), jnp.int32)}


def random_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.Array]:
    """Random latents and labels of those shapes, on the devices."""
    rng, shapes = np.random.default_rng(0), batch_shapes(config, mesh)
    batch = {
        "image": rng.standard_normal(shapes["image"].shape, np.float32),
        "label": rng.integers(0, config.model.num_classes, shapes["label"].shape, np.int32),
    }
    return jax.device_put(batch, batch_sharding(mesh))


def compile_step(config: ConfigDict, mesh: Mesh) -> jax.stages.Compiled:
    """The train step as train.py compiles it."""
    state, batch = abstract_state(config, mesh), batch_shapes(config, mesh)
    return make_train_step(config, mesh).lower(state, batch).compile()


def compile_forward(config: ConfigDict, mesh: Mesh) -> jax.stages.Compiled:
    """The velocity, as sampling computes it, of (parameters, a batch's images, times, labels)."""
    graphdef, _ = abstract_model(config.model)
    params, batch = abstract_state(config, mesh).params, batch_shapes(config, mesh)
    times = jax.ShapeDtypeStruct((config.train.batch_size,), jnp.float32)
    forward = jax.jit(functools.partial(apply_model, graphdef))
    return forward.lower(params, batch["image"], times, batch["label"]).compile()
