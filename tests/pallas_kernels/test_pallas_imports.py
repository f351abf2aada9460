"""Plain JAX does without the private modules of JAX that the Pallas kernels need."""

import sys

import pytest

from tests import tiny

PROGRAM = """
import sys
import jax.numpy as jnp
from flax import nnx
from flowdcn_jax.models import build_model
from pallas_kernels.deformable_conv import deformable_aggregate
from tests import tiny
{use}
sys.exit("jax._src.pallas.triton" in sys.modules)
"""
USES = {
    "sit": """
model = build_model(tiny.config(model=tiny.SIT).model, rngs=nnx.Rngs(0))
model(jnp.ones((1, 4, 4, 1)), jnp.ones(1), jnp.ones(1, int))
""",
    "xla": """
points = jnp.ones((1, 2, 2, 1, 1, 2)), jnp.ones((1, 2, 2, 1, 1))
deformable_aggregate(jnp.ones((1, 2, 2, 1, 3)), *points, implementation="xla")
""",
}


@pytest.mark.parametrize("use", USES)
def test_plain_jax_loads_no_triton(use):
    code, output = tiny.run([sys.executable, "-c", PROGRAM.format(use=USES[use])])
    assert code == 0, output
