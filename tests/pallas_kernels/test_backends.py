"""Without one of Pallas' backends the other's kernels work, and plain JAX does the rest."""

import re
import sys

import pytest

from tests import tiny
from tests.conftest import REPOSITORY

# A JAX whose Pallas lacks a backend, and a GPU for which a forward and a backward are lowered.
PROGRAM = """
import functools, sys
for name in {missing}:
    sys.modules[name] = None  # an import of it fails
import jax
from pallas_kernels.deformable_conv import api, pallas
from tests.pallas_kernels.aggregation import lowered_for_an_h100, named_structs
pallas.is_hopper = api.is_hopper = lambda: {hopper}
api.why_no_nvidia_kernels = lambda: None
aggregate = functools.partial(
    pallas.deformable_aggregate_pallas, boundary="zeros", interpret=False, or_xla=True
)

def both(values, points):
    out, vjp = jax.vjp(aggregate, values, points)
    return out, vjp(out)

text = lowered_for_an_h100(both, *named_structs("XL at 256", "bfloat16"))
print(api.why_not_pallas())
print([name for name in ("mosaic_gpu", "triton") if name in text])
"""
TRITON = ["jax.experimental.pallas.triton", "jax._src.pallas.triton"]
MOSAIC_GPU = ["jax.experimental.pallas.mosaic_gpu", "jax.experimental.mosaic.gpu"]


@pytest.mark.parametrize(
    "missing, hopper, kernels",
    [
        (TRITON, True, ["mosaic_gpu"]),
        (TRITON, False, []),
        (MOSAIC_GPU, True, ["triton"]),
        (TRITON + MOSAIC_GPU, True, []),
    ],
)
def test_a_backend_that_is_gone_is_passed_over(missing, hopper, kernels):
    program = PROGRAM.format(missing=missing, hopper=hopper)
    code, output = tiny.run([sys.executable, "-c", program])
    assert code == 0, output
    reason, found = output.splitlines()[-2:]
    assert found == str(kernels)
    assert (reason == "None") == bool(kernels)
    assert kernels or "lacks Pallas' Triton backend" in reason


def test_private_names_of_jax_stand_in_one_file():
    """jax 0.10, 0.11 and 0.12 have them."""
    found, package = {}, REPOSITORY / "pallas_kernels"
    for path in sorted(package.rglob("*.py")):
        private = re.findall(r"^(?:from|import) (jax\._src.*)", path.read_text(), re.MULTILINE)
        if private:
            found[str(path.relative_to(package))] = private
    assert found == {
        "deformable_conv/triton.py": [
            "jax._src.lib.triton import dialect as triton_dialect",
            "jax._src.pallas.triton import lowering as triton_lowering",
        ]
    }
