"""Every config is whole: it holds default.py's keys, passes the checks, and says how to run it."""

import copy
import importlib
import json
import re

import ml_collections
import numpy as np
import pytest

from flowdcn_jax import models
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.validation import (
    ADDED_TO_DATA,
    REMOVED_FROM_DATA,
    check_keys,
    check_resumable,
    validate,
)
from tests.tiny import CONFIGS


def keys(config, prefix=""):
    for key, value in config.items():
        yield from keys(value, f"{prefix}{key}.") if hasattr(value, "items") else [prefix + key]


def counts(config) -> tuple[int, int]:
    """(parameters, MACs of an image), from models of one and two blocks, for blocks are all alike.

    Building XL/2 takes seconds; tests/models holds the full sizes to published figures.
    """
    side = config.data.image_size // config.autoencoder.downsampling
    model = ml_collections.ConfigDict(config.model)

    def of_depth(depth):
        model.depth = depth
        _, params = models.abstract_model(model)
        return np.array([models.parameter_count(params), models.forward_macs(model, side, side)])

    one, two = of_depth(1), of_depth(2)
    return tuple(one + (config.model.depth - 1) * (two - one))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_whole_and_says_what_it_costs(name):
    module = importlib.import_module(f"configs.{name}")
    config, default = module.get_config(), importlib.import_module("configs.default").get_config()
    assert set(config.model) == set(models.model_options(config.model.name))
    default.unlock()
    del default.model
    assert set(keys(config)) - {f"model.{key}" for key in config.model} == set(keys(default))
    validate(config, num_devices=8, num_processes=2)
    if name == "default":
        return
    assert f"python train.py --config=configs/{name}.py" in module.__doc__
    for count, unit in zip(counts(config), (r"M\s+parameters", r"GMACs\s+an\s+image"), strict=True):
        stated = re.search(rf"([\d.]+)\s+{unit}", module.__doc__)
        if stated or unit.startswith("M"):
            digits = len(stated[1].partition(".")[2])
            assert float(stated[1]) == round(count / (1e6 if unit[0] == "M" else 1e9), digits)


def test_every_key_must_be_there_and_no_other():
    whole = importlib.import_module("configs.default").get_config().unlock()
    for key in keys(whole):
        *sections, name = key.split(".")
        config = copy.deepcopy(whole)
        section = config
        for part in sections:
            section = section[part]
        value = section[name]
        del section[name]
        if sections != ["model"] or models.model_options("flowdcn").get(name) is None:
            with pytest.raises(ConfigError, match=f"config.{key} is missing"):
                validate(config, num_devices=8, num_processes=2)
        section[name], section["typo"] = value, 1
        where = ".".join(["config", *sections, "typo"])
        with pytest.raises(ConfigError, match=f"{where} is (unknown|1; expected no such key)"):
            check_keys(config)


def test_a_config_saved_before_an_option_was_there_means_the_published_model():
    config = importlib.import_module("configs.s2").get_config()
    saved = json.loads(config.to_json())
    for key in ("norm", "mlp", "scale_prior", "learn_scale_prior"):
        del saved["model"][key]
    old = ml_collections.ConfigDict(saved["model"])
    assert models.abstract_model(old)[0] == models.abstract_model(config.model)[0]
    check_resumable(saved, config)
    config.model.norm = "layer_norm"
    with pytest.raises(ConfigError, match="config.model.norm: rms_norm -> layer_norm"):
        check_resumable(saved, config)


# Every key that config.data had at first.
FIRST_DATA_KEYS = {
    "name", "data_dir", "split", "image_size", "random_flip", "num_threads", "prefetch_batches",
}  # fmt: skip


def test_a_run_saved_before_a_data_key_was_there_can_be_resumed():
    """A key that is added needs the value that means the old behaviour, in `ADDED_TO_DATA`."""
    config = importlib.import_module("configs.s2").get_config()
    saved = json.loads(config.to_json())
    assert set(saved["data"]) - FIRST_DATA_KEYS == set(ADDED_TO_DATA)
    for key in ADDED_TO_DATA:
        old = saved | {"data": {k: v for k, v in saved["data"].items() if k != key}}
        check_resumable(old, config)
    config.data.aspect_buckets.min_aspect = 0.6  # without buckets it means nothing
    check_resumable(old, config)
    config.data.aspect_buckets.count = 10
    with pytest.raises(ConfigError, match="config.data.aspect_buckets.count: 0 -> 10; .*min_aspec"):
        check_resumable(old, config)


def test_a_run_saved_with_a_key_that_is_gone_can_be_resumed():
    config = importlib.import_module("configs.s2").get_config()
    saved = json.loads(config.to_json())
    for key in REMOVED_FROM_DATA:
        saved["data"][key] = 0.18215
        assert key not in config.data
    check_resumable(saved, config)
