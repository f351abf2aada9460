"""Tests run on eight virtual CPU devices, so that meshes are real; with `-m gpu`, on the GPU."""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Many tests start commands that compile what others have compiled. Workers inherit the folder.
if "FLOWDCN_TEST_CACHE" not in os.environ:
    os.environ["FLOWDCN_TEST_CACHE"] = tempfile.mkdtemp(prefix="flowdcn_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["FLOWDCN_TEST_CACHE"]
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import numpy as np
import pytest

from flowdcn_jax import faults
from tests import compilation

FIXTURES = Path(__file__).parent / "fixtures"
REPOSITORY = Path(__file__).parent.parent


def pytest_configure(config):
    if config.getoption("-m") != "gpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):  # the workers, if there are any, have ended
        shutil.rmtree(os.environ["FLOWDCN_TEST_CACHE"], ignore_errors=True)


# What takes longest, and what waits for processes of its own, comes first: workers that share the
# files (--dist=loadfile) then end at the same time.
LONGEST = (
    "test_distributed.py",
    "test_run.py",
    "test_two_processes.py",
    "test_pallas.py",
    "test_official.py",
    "test_list_gradient.py",
    "test_deformable_conv.py",
    "test_keys.py",
    "test_before.py",
    "test_commands.py",
    "test_not_finite.py",
    "test_flowdcn.py",
)


def pytest_collection_modifyitems(config, items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if config.getoption("-m") != "slow":
        skip_slow = pytest.mark.skip(reason="takes long; needs the option -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip_slow)
    if config.getoption("-m") == "gpu" and jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs a GPU, and the option -m gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """What may pass is tried again at once."""
    monkeypatch.setattr(faults, "WAITS_S", (0, 0, 0))


@pytest.fixture(scope="session")
def fixture_file():
    """Reads a golden fixture: fixture_file("op.npz") -> dict of arrays."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(FIXTURES / name, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    return read


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project's folder, from which train.py and sample.py are run."""
    return REPOSITORY


@pytest.fixture(scope="module")
def quick_compilation():
    """Halves the time to compile, for tests that hardly run what they compile."""
    with compilation.quick():
        yield
