"""A run to sample from: a checkpoint with random weights, for a fresh model's velocity is zero."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax.models import abstract_model
from flowdcn_jax.runs.checkpointer import Checkpointer
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import TrainState
from flowdcn_jax.sampling import load_trained
from tests import tiny

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A run's folder with the checkpoint of step 3, and of step 2 with half the weights."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny.config()
    random = np.random.default_rng(0)
    _, shapes = abstract_model(config.model)
    params = jax.tree.map(lambda leaf: 0.3 * random.standard_normal(leaf.shape, np.float32), shapes)
    checkpointer = Checkpointer(str(workdir), keep=2, keep_every_steps=None)
    for step, factor in ((2, 0.5), (3, 1.0)):
        ema = jax.tree.map(partial(jnp.multiply, factor), params)
        state = TrainState(jnp.asarray(step), params=ema, opt_state={}, ema=ema)
        checkpointer.save(state, config, CLASS_NAMES)
    checkpointer.close()
    return workdir


@pytest.fixture(scope="session")
def one_device():
    """A mesh of one of the eight devices, for which less is compiled."""
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def model(workdir, one_device):
    """The run, loaded once: its compiled programs are shared by all tests."""
    return load_trained(workdir, mesh=one_device)


@pytest.fixture(scope="session")
def latents_model(workdir):
    """latents_model(n): the run on n devices, as a model of latents without a decoder."""

    @cache
    def load(num_devices):
        mesh = make_mesh(devices=jax.devices()[:num_devices])
        return load_trained(workdir, mesh=mesh, autoencoder="none")

    return load
