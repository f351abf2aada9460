"""A run to sample from: a checkpoint with random weights, for a fresh model's velocity is zero."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax.models import abstract_model
from flowdcn_jax.runs.checkpoint import Checkpointer
from flowdcn_jax.runs.state import TrainState
from tests import tiny

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def params():
    """Random parameters of the tiny model."""
    random = np.random.default_rng(0)
    _, params = abstract_model(tiny.config().model)
    return jax.tree.map(lambda leaf: 0.3 * random.standard_normal(leaf.shape, np.float32), params)


@pytest.fixture(scope="session")
def workdir(params, tmp_path_factory):
    """A run's folder with the checkpoint of step 3, and of step 2 with half the weights."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny.config()
    checkpointer = Checkpointer(str(workdir), keep=2, keep_every_steps=None)
    for step, factor in ((2, 0.5), (3, 1.0)):
        ema = jax.tree.map(partial(jnp.multiply, factor), params)
        state = TrainState(jnp.asarray(step), params=ema, opt_state={}, ema=ema)
        checkpointer.save(state, config, CLASS_NAMES)
    checkpointer.close()
    return workdir
