"""A server on the loopback address with tiny weights, a table of them, and an empty cache."""

import time

import huggingface_hub.constants
import huggingface_hub.utils._http as hub_http
import pytest

from flowdcn_jax.named_weights import table, transfer
from flowdcn_jax.sampling import named_model
from tests.named_weights import tiny_names
from tests.named_weights.server import serving


@pytest.fixture(scope="session")
def files():
    """What servers have at first."""
    return tiny_names.files()


@pytest.fixture
def server(files):
    """A server with the tiny weights."""
    with serving() as running:
        running.files.update(files)
        yield running


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Tiny files come in several pieces; what does not answer is given up soon."""
    monkeypatch.setattr(transfer, "PIECE_BYTES", 2**12)
    monkeypatch.setattr(transfer, "SILENCE_S", 0.2)


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """The cache's folder, empty; the table is the tiny one, and `server` the hub."""
    monkeypatch.setenv("FLOWDCN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(hub_http.time, "sleep", _unless_long(time.sleep))
    for name in list(table.TABLE):
        monkeypatch.delitem(table.TABLE, name)
    for name, weights in tiny_names.names(server.url).items():
        monkeypatch.setitem(table.TABLE, name, weights)
    monkeypatch.setattr(named_model, "load_config", tiny_names.config)
    return tmp_path / "cache"


def _unless_long(sleep):
    """The hub's client waits seconds before it tries again."""
    return lambda seconds: sleep(min(seconds, 0.01))
