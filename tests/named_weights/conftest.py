"""A server on the loopback address with tiny weights, a table of them, and an empty cache."""

import pytest

from tests.named_weights import tiny_names
from tests.named_weights.server import serving
from tests.named_weights.world import world


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


@pytest.fixture
def cache(server, tmp_path):
    """The cache's folder, not there yet; the table is the tiny one, and `server` the hub."""
    with world(tmp_path, server.url) as folder:
        yield folder
