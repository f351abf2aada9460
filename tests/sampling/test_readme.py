"""The README's Python runs, on a tiny run instead of the digits."""

import re

import jax.numpy as jnp
import pytest

from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_python_blocks_run(workdir, one_device):
    text = (tiny.REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    sampling, operator = blocks
    space = {"x": jnp.zeros((2, 8, 8, 1)), "t": jnp.zeros(2), "y": jnp.array([3, 7])}
    space |= {"noise": space["x"], "one_device": one_device}  # compiles faster than eight
    sampling = sampling.replace('load_trained("runs/digits")', "load_trained(RUN, mesh=one_device)")
    exec(sampling.replace('"runs/digits"', "RUN").replace("RUN", repr(str(workdir))), space)
    assert space["trained"].mesh is one_device
    assert space["images"].shape == (8, 8, 8, 1) and space["x"].shape == (2, 8, 8, 1)
    exec(operator, space)
    assert space["out"].shape == (2, 16, 16, 6, 64) and jnp.isfinite(space["out"]).all()
