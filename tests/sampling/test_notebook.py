"""The notebook's cells run, on a tiny run instead of the digits."""

import json

import jax
import pytest

import flowdcn_jax
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.sampling import trained_model
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def cells():
    notebook = json.loads((tiny.REPOSITORY / "docs" / "sampling.ipynb").read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_cells_run(cells, workdir, monkeypatch, capsys):
    monkeypatch.chdir(tiny.REPOSITORY / "docs")
    one_device = make_mesh(devices=jax.devices()[:1])  # compiles faster than eight
    monkeypatch.setattr(trained_model, "make_mesh", lambda: one_device)
    space = {}
    for cell in cells:
        exec(compile(cell.replace('"../runs/digits"', repr(str(workdir))), "cell", "exec"), space)
    assert "as solve does: True" in capsys.readouterr().out
    assert space["images"].shape == (16, 8, 8, 1)
    shapes = {size: images.shape for (size, _), images in space["larger"].items()}
    assert shapes == {"16x24": (4, 16, 24, 1), "24x24": (4, 24, 24, 1)}
    assert space["flowdcn_jax"] is flowdcn_jax
