"""Every config is whole: it holds default.py's keys, passes the checks, and says how to run it."""

import copy
import importlib
import json
import re
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from flowdcn_jax import models
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.validation import check_keys, check_resumable, validate
from tests.tiny import REPOSITORY

NAMES = sorted(
    path.stem for path in Path(REPOSITORY, "configs").glob("*.py") if path.stem[0] != "_"
)


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
        return np.array([models.parameter_count(model), models.forward_macs(model, side, side)])

    one, two = of_depth(1), of_depth(2)
    return tuple(one + (config.model.depth - 1) * (two - one))


@pytest.mark.parametrize("name", NAMES)
def test_config_is_whole_and_says_what_it_costs(name):
    module = importlib.import_module(f"configs.{name}")
    config, default = module.get_config(), importlib.import_module("configs.default").get_config()
    assert set(config.model) == set(models.model_options(config.model.name))
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
