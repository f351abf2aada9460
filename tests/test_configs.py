"""Every config is whole: it holds default.py's keys, passes the checks, and says how to run it."""

import importlib
from pathlib import Path

import pytest

from flowdcn_jax import models
from flowdcn_jax.validation import validate
from tests.tiny import REPOSITORY

NAMES = sorted(
    path.stem for path in Path(REPOSITORY, "configs").glob("*.py") if path.stem[0] != "_"
)


def keys(config, prefix=""):
    for key, value in config.items():
        yield from keys(value, f"{prefix}{key}.") if hasattr(value, "items") else [prefix + key]


@pytest.mark.parametrize("name", NAMES)
def test_config_is_whole(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    default = importlib.import_module("configs.default").get_config()
    assert set(keys(config)) == set(keys(default))
    validate(config, num_devices=8, num_processes=2)
    side = config.data.image_size // config.autoencoder.downsampling
    assert models.forward_macs(config.model, side, side) > 0
    if name != "default":
        assert f"python train.py --config=configs/{name}.py" in module.__doc__
