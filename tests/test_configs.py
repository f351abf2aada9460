"""Every config is whole: it holds every key, passes the checks, and says how to run it."""

import copy
import json
import re

import ml_collections
import numpy as np
import pytest

from flowdcn_jax import models
from flowdcn_jax.config import (
    check_keys,
    config_module,
    config_names,
    default_config,
    fixed_keys,
    flatten,
    load_config,
    lookup,
    model_config,
    modernise,
    validate,
)
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.runs.record import ADDED, check_resumable


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


@pytest.mark.parametrize("name", config_names())
def test_config_is_whole_and_says_what_it_costs(name):
    module = config_module(name)
    config = module.get_config()
    validate(config, num_devices=8, num_processes=2)
    if name == "default":
        return
    assert f"python train.py --config=configs/{name}.py" in module.__doc__
    for count, unit in zip(counts(config), (r"M\s+parameters", r"GMACs\s+an\s+image"), strict=True):
        stated = re.search(rf"([\d.]+)\s+{unit}", module.__doc__)
        if stated or unit.startswith("M"):
            digits = len(stated[1].partition(".")[2])
            assert float(stated[1]) == round(count / (1e6 if unit[0] == "M" else 1e9), digits)


def with_value(config, key, value):
    """A copy of a config with another value of a key, whatever its type."""
    config = copy.deepcopy(config).unlock()
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    with config.ignore_type():
        section[name] = value
    return config


@pytest.mark.parametrize("model", sorted(models.MODELS))
def test_every_key_must_be_there_and_no_other(model):
    whole = default_config().unlock()
    whole.model = model_config(model)
    for key in flatten(whole):
        *sections, name = key.split(".")
        config = copy.deepcopy(whole)
        section = config
        for part in sections:
            section = section[part]
        value = section[name]
        del section[name]
        with pytest.raises(ConfigError, match=f"config.{key} is missing"):
            check_keys(config)
        section[name], section["typo"] = value, 1
        where = ".".join(["config", *sections, "typo"])
        with pytest.raises(ConfigError, match=f"{where} is (unknown|1; expected no such key)"):
            check_keys(config)


# A value of the key's type, or of another, that is out of its range; every key has one here.
BAD = {
    "seed": -1,
    "data.name": "mnist",
    "data.data_dir": 3,
    "data.split": 3,
    "data.image_size": 0,
    "data.random_flip": "yes",
    "data.num_threads": 0,
    "data.prefetch_batches": 0,
    "data.aspect_buckets.count": -1,
    "data.aspect_buckets.min_aspect": "wide",
    "data.aspect_buckets.max_aspect": float("inf"),
    "data.aspect_buckets.side_multiple": 1.5,
    "autoencoder.name": "vae",
    "autoencoder.weights": 3,
    "autoencoder.downsampling": 0,
    "autoencoder.dtype": "float16",
    "train.batch_size": 0,
    "train.num_steps": 0,
    "train.accumulation_steps": 0,
    "flow.time_distribution": "normal",
    "flow.label_dropout": 1.0,
    "flow.objective": "diffusion",
    "flow.mean_flow.tangent": "data",
    "flow.mean_flow.equal_share": 1.5,
    "flow.mean_flow.time_distribution": "normal",
    "flow.mean_flow.t_mean": 11.0,
    "flow.mean_flow.t_std": 0.0,
    "flow.mean_flow.r_mean": float("nan"),
    "flow.mean_flow.r_std": -1.0,
    "flow.mean_flow.r_below_t": "drop",
    "flow.mean_flow.weight_power": -1.0,
    "flow.mean_flow.weight_offset": 0.0,
    "flow.mean_flow.guidance_omega": -1.0,
    "flow.mean_flow.guidance_kappa": 1.0,
    "flow.mean_flow.guidance_begin": -0.1,
    "flow.mean_flow.guidance_end": 1.1,
    "flow.mean_flow.derivative_dtype": "float16",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.0,
    "optimizer.schedule": "step",
    "optimizer.final_learning_rate": -1e-4,
    "optimizer.warmup_steps": -1,
    "optimizer.weight_decay": -0.1,
    "optimizer.b1": 1.0,
    "optimizer.b2": -0.1,
    "optimizer.epsilon": 0.0,
    "optimizer.clip_norm": 0.0,
    "ema.decay": 1.0,
    "ema.warmup": 1.0,
    "ema.others": ("power_0.05", "power_0.5"),
    "mesh.data": "all",
    "mesh.fsdp": 0.5,
    "checkpoint.every_steps": 0,
    "checkpoint.keep": 0,
    "checkpoint.every_minutes": 0.0,
    "checkpoint.keep_every_steps": 0,
    "log.every_steps": 0,
    "log.sample_every_steps": -1,
    "log.wandb_project": 3,
    "sampling.num_images": 0,
    "sampling.num_steps": True,
    "sampling.guidance": float("nan"),
    "sampling.seed": 2**32,
    "sampling.classes": ("cat",),
    "evaluate.every_steps": -1,
    "evaluate.num_images": 1,
    "evaluate.num_steps": 0,
    "evaluate.guidance": -1.0,
    "evaluate.features": "vgg",
    "evaluate.weights": 3,
    "evaluate.reference": 3,
    "model.name": "unet",
    "model.width": 0,
    "model.depth": 0,
    "model.patch_size": 0,
    "model.in_channels": 0,
    "model.num_classes": 0,
    "model.learn_sigma": 1,
    "model.dtype": "float64",
    "model.remat": "some",
    "model.second_time": True,  # of a velocity
    "model.attention": "flash",
    "model.gradient_dtype": "float16",
    "model.num_groups": 5,
    "model.boundary": "reflect",
    "model.max_scale": 0.0,
    "model.scale_prior": "wide",
    "model.learn_scale_prior": None,
    "model.norm": "batch_norm",
    "model.mlp": "relu",
    "model.kernel_size": 4,
    "model.num_heads": 7,
}


@pytest.mark.parametrize("key", BAD)
def test_a_value_out_of_range_is_named(key):
    config = default_config().unlock()
    config.model = next(
        model_config(name)
        for name in ("flowdcn", "flowcnn", "sit")
        if key.removeprefix("model.") in model_config(name) or not key.startswith("model.")
    )
    with pytest.raises(ConfigError, match=f"config.{key}|config.model.width"):
        validate(with_value(config, key, BAD[key]), num_devices=1, num_processes=1)


def test_every_key_has_a_value_out_of_range():
    keys = set(flatten(default_config()))
    for name in models.MODELS:
        keys |= {f"model.{key}" for key in model_config(name)}
    assert set(BAD) == keys


def test_a_run_keeps_what_decides_it_and_nothing_else():
    fixed = fixed_keys("flowdcn")
    changing = {"data_dir", "num_threads", "prefetch_batches"}
    for key in flatten(default_config()):
        section, _, name = key.partition(".")
        decides = section in ("seed", "model", "data")
        decides = decides or key in ("train.batch_size", "optimizer.name", "flow.objective")
        kept = decides and name not in (*changing, "dtype", "gradient_dtype", "remat")
        assert (key in fixed) == kept, key


def test_a_config_saved_before_an_option_was_there_means_the_published_model():
    config = load_config("s2")
    saved = json.loads(config.to_json())
    for key in ("norm", "mlp", "scale_prior", "learn_scale_prior"):
        del saved["model"][key]
    old = ml_collections.ConfigDict(saved["model"])
    assert models.abstract_model(old)[0] == models.abstract_model(config.model)[0]
    check_resumable(saved, config)
    config.model.norm = "layer_norm"
    with pytest.raises(ConfigError, match="config.model.norm: 'rms_norm' -> 'layer_norm'"):
        check_resumable(saved, config)


# Every key that config.data had at first.
FIRST_DATA_KEYS = {
    "name", "data_dir", "split", "image_size", "random_flip", "num_threads", "prefetch_batches",
}  # fmt: skip


def test_a_run_saved_before_a_data_key_was_there_can_be_resumed():
    """A key that is added needs the value that means the old behaviour, in `ADDED`."""
    config = load_config("s2")
    saved = json.loads(config.to_json())
    added = set(saved["data"]) - FIRST_DATA_KEYS
    sections = {key.rpartition(".")[0] for key in ADDED if key.startswith("data.")}
    assert {f"data.{key}" for key in added} == sections
    old = saved | {"data": {k: v for k, v in saved["data"].items() if k not in added}}
    check_resumable(old, config)
    config.data.aspect_buckets.min_aspect = 0.6  # without buckets it means nothing
    check_resumable(old, config)
    config.data.aspect_buckets.count = 10
    with pytest.raises(ConfigError, match="config.data.aspect_buckets.count: 0 -> 10"):
        check_resumable(old, config)


def test_a_run_saved_before_there_was_a_choice_of_optimizer_goes_on_with_adamw():
    config = load_config("s2")
    saved = json.loads(config.to_json())
    for key in ("name", "schedule", "final_learning_rate"):
        del saved["optimizer"][key]
    saved["ema"] = {"decay": 0.9999}
    check_resumable(saved, config)
    config.optimizer.name = "muon"
    with pytest.raises(ConfigError, match="config.optimizer.name: 'adamw' -> 'muon'"):
        check_resumable(saved, config)


def test_a_run_saved_with_a_key_that_is_gone_can_be_resumed():
    config = load_config("s2")
    saved = json.loads(config.to_json())
    saved["data"]["latent_scale"] = 0.18215
    check_resumable(saved, config)


def test_old_names_are_read():
    config = load_config("s2")
    saved = json.loads(config.to_json())
    saved["data"]["name"], saved["autoencoder"]["name"] = "imagenet_latents", "none"
    check_resumable(saved, config)
    old = with_value(config, "data.name", "imagenet_latents")
    old.autoencoder.name = "none"
    validate(modernise(old), num_devices=1, num_processes=1)
    assert lookup(old, "data.name") == "latents" and lookup(old, "autoencoder.name") == "preview"


def test_an_unknown_config_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="no config 'xl3'; expected one of b2, .*, xl2"):
        load_config("xl3")
