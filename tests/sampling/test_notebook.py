"""The notebook's cells run, on a tiny run instead of the digits."""

import json

import pytest

import flowdcn_jax
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def cells():
    notebook = json.loads((tiny.REPOSITORY / "docs" / "sampling.ipynb").read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


@pytest.mark.slow
def test_the_cells_run(cells, workdir, one_device, monkeypatch, capsys):
    monkeypatch.chdir(tiny.REPOSITORY / "docs")
    space = {"one_device": one_device}  # compiles faster than eight
    for cell in cells:
        cell = cell.replace('"../runs/digits"', repr(str(workdir)))
        cell = cell.replace("load_trained(workdir)", "load_trained(workdir, mesh=one_device)")
        exec(compile(cell, "cell", "exec"), space)
    assert space["trained"].mesh is one_device
    assert "as solve does: True" in capsys.readouterr().out
    assert space["images"].shape == (16, 8, 8, 1)
    shapes = {size: images.shape for (size, _), images in space["larger"].items()}
    assert shapes == {"16x24": (4, 16, 24, 1), "24x24": (4, 24, 24, 1)}
    assert space["flowdcn_jax"] is flowdcn_jax
