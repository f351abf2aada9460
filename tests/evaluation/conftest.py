"""Feature networks' weights to test with, as files."""

import json
import os
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flowdcn_jax.evaluation import drawing, load_features
from flowdcn_jax.runs.sharding import make_mesh
from tests import compilation, tiny
from tests.conftest import FIXTURES
from tests.evaluation import fakes

TINY_DINOV2 = FIXTURES / "tiny_dinov2"


@pytest.fixture(scope="session")
def load():
    """load_features on one device, two images at a time."""

    def load(name, weights, **options):
        mesh = make_mesh(devices=jax.devices()[:1])
        return load_features(name, **dict(weights=weights, batch_size=2, mesh=mesh) | options)

    return load


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data, or a skipped test."""
    folder = os.environ.get("FLOWDCN_TEST_DATA")
    if not folder or not Path(folder, "efficientnet_lite0.safetensors").is_file():
        pytest.skip("set FLOWDCN_TEST_DATA to the folder of efficientnet_lite0.safetensors")
    return Path(folder)


@pytest.fixture(scope="session")
def dinov2_tensors() -> dict[str, np.ndarray]:
    """The tiny DINOv2's, by the names of transformers."""
    return load_file(TINY_DINOV2 / "model.safetensors")


@pytest.fixture
def write_dinov2(tmp_path):
    """write_dinov2(tensors) -> a file of them, with the tiny network's config.json beside it."""

    def write(tensors, name="dinov2.safetensors"):
        (tmp_path / "config.json").write_text((TINY_DINOV2 / "config.json").read_text())
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


def inception_tensors(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights that anyone can draw again, by the recipe with which inception.npz was made."""
    tensors = {}
    for name, shape in shapes.items():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        drawn = generator.standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            value = np.abs(drawn) * np.float32(0.2) + np.float32(0.9)
        elif drawn.ndim == 1 and name.endswith(".weight"):
            value = 1 + np.float32(0.1) * drawn
        elif drawn.ndim == 1:
            value = np.float32(0.1) * drawn
        elif drawn.ndim == 0:
            value = np.int64(0)
        else:
            value = (drawn * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
        tensors[name] = np.asarray(value)
    return tensors


@pytest.fixture(scope="session")
def inception_file(fixture_file, tmp_path_factory) -> Path:
    """Inception with the weights of inception.npz."""
    shapes = json.loads(str(fixture_file("inception.npz")["param_shapes"]))
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(inception_tensors(shapes), path)
    return path


@pytest.fixture(scope="session")
def fake_network():
    """Puts a fake network where training would load a real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "load_features", fakes.load_features)
        yield


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory, fake_network) -> Path:
    """A workdir with checkpoints 3 and 6, evaluated at steps 4 and 6."""
    workdir = tmp_path_factory.mktemp("evaluated")
    with compilation.quick():
        tiny.train(tiny.config(**fakes.EVALUATED), workdir)
    return workdir
