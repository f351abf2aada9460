"""The README's Python runs, on a tiny run instead of the digits."""

import re

import jax
import jax.numpy as jnp
import pytest

from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.sampling import trained_model
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_python_blocks_run(workdir, monkeypatch):
    text = (tiny.REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    sampling, operator = blocks
    one_device = make_mesh(devices=jax.devices()[:1])  # compiles faster than eight
    monkeypatch.setattr(trained_model, "make_mesh", lambda: one_device)
    space = {"x": jnp.zeros((2, 8, 8, 1)), "t": jnp.zeros(2), "y": jnp.array([3, 7])}
    space["noise"] = space["x"]
    exec(sampling.replace('"runs/digits"', repr(str(workdir))), space)
    assert space["images"].shape == (8, 8, 8, 1) and space["x"].shape == (2, 8, 8, 1)
    exec(operator, space)
    assert space["out"].shape == (2, 16, 16, 6, 64) and jnp.isfinite(space["out"]).all()
