"""Training's step, and what stands in for it where there is no GPU."""

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowdcn_jax.runs.state import initial_state
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
