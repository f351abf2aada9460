"""Fifty steps whose losses and gradient norms are kept as numbers.

A change that moves them changes training, and says why. After it:

    python -m tests.training.test_loss_curve
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from flowdcn_jax.training import loop
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

CURVE = Path(__file__).parent.parent / "fixtures" / "loss_curve.json"


def train(workdir) -> np.ndarray:
    """[50,2]: losses and gradient norms of a run of train.py's loop, float32 on one CPU device."""
    config = tiny.config(train__num_steps=50, checkpoint__every_steps=50)

    def drawer(*_):
        return lambda ema: np.zeros((8, 8, 3), np.uint8)

    loop.train(config, str(workdir), drawer, devices=jax.devices("cpu")[:1])
    return np.array([row[1:] for row in tiny.numbers(workdir)])


def test_the_curve_is_the_one_that_was_kept(tmp_path):
    """Eight devices or another compilation move losses by 1e-6 and norms by 5e-5, b1=0.91 by a
    fiftieth and a half."""
    losses, norms = train(tmp_path).T
    kept_losses, kept_norms = np.array(json.loads(CURVE.read_text())).T
    np.testing.assert_allclose(losses, kept_losses, rtol=1e-4)
    np.testing.assert_allclose(norms, kept_norms, rtol=1e-3)


if __name__ == "__main__":
    import tempfile

    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = [json.dumps([round(float(x), 6) for x in row]) for row in train(folder)]
    CURVE.write_text("[\n" + ",\n".join(rows) + "\n]\n")
