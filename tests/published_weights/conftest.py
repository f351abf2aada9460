"""Weight files made from the golden fixtures, in every form that needs no PyTorch."""

import functools

import pytest

from flowdcn_jax.published_weights import convert
from tests import official


@pytest.fixture(scope="session")
def golden(fixture_file):
    """The tiny official FlowDCN."""
    return fixture_file("model.npz")


@pytest.fixture(scope="session")
def tensors(golden):
    """Its state dict."""
    return official.state_dict(golden)


@pytest.fixture
def write(tmp_path):
    """write(tensors) -> the path of a safetensors file of them."""

    return lambda tensors: official.write_safetensors(tmp_path / "source.safetensors", tensors)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, fixture_file):
    """converted("model.npz") -> (fixture, workdir of its weights), once a module."""

    @functools.cache
    def convert_once(file):
        golden, folder = fixture_file(file), tmp_path_factory.mktemp("converted")
        source = official.write_safetensors(folder / "source", official.state_dict(golden))
        convert(source, official.run_config(golden), folder / "run")
        return golden, folder / "run"

    return convert_once
