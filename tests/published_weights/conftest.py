"""Weight files made from the golden fixtures, in every form that needs no PyTorch."""

import pytest

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
