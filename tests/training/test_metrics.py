"""The figures of a line of metrics."""

import jax
import numpy as np
import pytest

from flowdcn_jax import data
from flowdcn_jax.training import metrics
from tests import tiny


def test_utilisation_counts_six_flops_a_multiply_add(monkeypatch):
    """Two an operation, of a forward pass and of a backward one that costs two."""
    config = tiny.config()
    macs = (
        16 * (4 * 16 + 16 * 8)  # of each of 4x4 patches: stem and final Linear
        + 16 * (16 * (16 + 36 + 18 + 18 + 16))  # values, directions, scales, weights and out
        + 16 * (3 * 16 * 42)  # SwiGLU
        + 256 * 16 + 16 * 16 + 16 * 96 + 16 * 32  # time, and both modulations
    )  # fmt: skip
    flops = metrics.train_flops_per_image(config, data.make_source(config.data))
    assert flops == 6 * macs
    monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    row = {name: np.float32(1) for name in ("loss", "grad_norm", "learning_rate")}
    line = metrics.summarise([row] * 5, config, metrics.Stopwatch(), flops)
    expected = line["images_per_s"] * 6 * macs / (1e9 * jax.device_count())
    assert line["model_flops_utilisation"] == pytest.approx(expected)


def test_images_a_second_are_those_of_whole_batches():
    class Watch:
        def restart(self):
            return 2.0, 0.25  # seconds, and the share spent waiting for data

    row = {name: np.float32(value) for name, value in (("loss", 1), ("grad_norm", 2))}
    rows = [row | {"learning_rate": np.float32(rate)} for rate in (0.1, 0.2, 0.3, 0.4)]
    line = metrics.summarise(rows, tiny.config(), Watch(), 1.0)
    assert line["images_per_s"] == 4 * 16 / 2.0 and line["data_wait"] == 0.25
    assert line["loss"] == 1 and line["grad_norm"] == 2
    assert line["learning_rate"] == pytest.approx(0.4)
