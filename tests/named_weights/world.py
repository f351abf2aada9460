"""A machine of its own: an empty cache, a hub on the loopback address, and the tiny table."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import huggingface_hub.constants as hub_constants
import huggingface_hub.utils._http as hub_http

from flowdcn_jax.named_weights import table, transfer
from flowdcn_jax.sampling import named_model
from tests.named_weights import tiny_names

SILENCE_S = 0.1


@contextlib.contextmanager
def world(folder: Path, address: str) -> Iterator[Path]:
    """Gives the cache's folder, which is not there yet; all is as it was at the end."""
    sleep = time.sleep
    environment = {"FLOWDCN_CACHE": str(folder / "cache"), "HF_ENDPOINT": address}
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        for each in (
            mock.patch.dict(os.environ, environment),
            mock.patch.dict(table.TABLE, tiny_names.names(address), clear=True),
            patch(hub_constants, "HF_HUB_CACHE", str(folder / "hub")),
            patch(hub_constants, "HF_HUB_DOWNLOAD_TIMEOUT", SILENCE_S),
            # The client waits seconds before it tries again.
            patch(hub_http.time, "sleep", lambda seconds: sleep(min(seconds, 0.01))),
            patch(named_model, "load_config", tiny_names.config),
            # Tiny files come in several pieces; what does not answer is given up soon.
            patch(transfer, "PIECE_BYTES", 2**12),
            patch(transfer, "SILENCE_S", SILENCE_S),
        ):
            stack.enter_context(each)
        yield folder / "cache"
