"""Muon and several EMAs in training: exact when a run goes on, the same on any mesh."""

import jax
import numpy as np
import pytest

from flowdcn_jax import data
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import initial_state
from flowdcn_jax.training import inputs
from flowdcn_jax.training.step import make_train_step
from tests import tiny, toy

pytestmark = pytest.mark.usefixtures("quick_compilation", "toys")

OPTIONS = dict(
    model__width=128,  # the kernels, of the size from which arrays are split
    optimizer__name="muon",
    optimizer__schedule="cosine",
    optimizer__weight_decay=0.1,
    train__num_steps=4,
    ema__warmup=0.05,
    ema__others=("power_0.1", "constant_0.9"),
)


@pytest.fixture(scope="module")
def toys():
    with toy.registered():
        yield


def test_a_run_that_goes_on_gives_the_same_bits(tmp_path):
    def train(folder):
        def drawer(*_):
            return lambda ema: np.zeros((8, 8, 3), np.uint8)

        config = toy.config(**OPTIONS)
        tiny.train(config, tmp_path / folder, make_grid_drawer=drawer)
        return tiny.checksums(tmp_path / folder, 4)

    straight = train("straight")
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    (tmp_path / "straight" / "checkpoints" / "2").rename(tmp_path / "resumed" / "checkpoints" / "2")
    assert train("resumed") == straight
    assert {"state", "ema", "ema_power_0.1", "ema_constant_0.9", "run"} == straight.keys()


def test_eight_devices_match_one():
    config = toy.config(**OPTIONS)

    def run(mesh):
        state, step = initial_state(config, mesh), make_train_step(config, mesh)
        stream = inputs.batches(config, data.make_source(config.data), mesh, start_step=0)
        for _ in range(3):
            state, _ = step(state, next(stream))
        return state

    one, eight = (run(make_mesh(1, n, jax.devices()[:n])) for n in (1, 8))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, one._replace(opt_state=()), eight._replace(opt_state=()))
    kernel = eight.params["blocks"][0]["linear"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_muon_scatters_nothing():
    """GPUs add the terms of a scatter in any order, so the same run would give other bits."""
    config, mesh = toy.config(**OPTIONS), make_mesh(1, 1, jax.devices()[:1])
    (batch,) = inputs.batch_shapes(config, data.make_source(config.data), mesh)
    text = make_train_step(config, mesh).lower(initial_state(config, mesh), batch).as_text()
    assert "stablehlo.dot_general" in text and "stablehlo.scatter" not in text
