"""Checks of a config, made before any work starts. Each error names the key, value and remedy."""

import json

from flowdcn_jax.autoencoders import AUTOENCODERS
from flowdcn_jax.data import SOURCES, DataError, aspect_buckets
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.flow.path import TIME_DISTRIBUTIONS
from flowdcn_jax.models import MODELS

# A run may go on with other values of these; everything else under model and data is fixed.
CHANGEABLE = {
    "model.dtype",
    "model.remat",
    "data.data_dir",
    "data.num_threads",
    "data.prefetch_batches",
}
FIXED = ("seed", "model", "data", "train.batch_size")

CHOICES = {
    "model.name": tuple(MODELS),
    "model.boundary": ("zeros", "truncate"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "data.name": tuple(SOURCES),
    "autoencoder.name": tuple(AUTOENCODERS),
    "autoencoder.dtype": ("auto", "float32", "bfloat16"),
    "flow.time_distribution": tuple(TIME_DISTRIBUTIONS),
}
AT_LEAST_ONE = (
    "model.width",
    "model.depth",
    "model.num_groups",
    "model.patch_size",
    "model.in_channels",
    "model.num_classes",
    "data.image_size",
    "data.num_threads",
    "data.prefetch_batches",
    "autoencoder.downsampling",
    "train.batch_size",
    "train.num_steps",
    "train.accumulation_steps",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "log.every_steps",
    "sampling.num_images",
    "sampling.num_steps",
)
SEEDS = ("seed", "sampling.seed")  # JAX keeps 32 bits of a seed without its 64-bit mode
NOT_NEGATIVE = (
    "data.aspect_buckets.count",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "log.sample_every_steps",
    "sampling.guidance",
)
POSITIVE = ("model.max_scale", "data.latent_scale", "optimizer.learning_rate", "optimizer.epsilon")
POSITIVE_OR_NONE = ("optimizer.clip_norm", "checkpoint.keep_every_steps")
FRACTIONS = ("flow.label_dropout", "optimizer.b1", "optimizer.b2", "ema.decay")


def lookup(config, key: str):
    """config.a.b for the key "a.b"."""
    for part in key.split("."):
        config = config[part]
    return config


def validate(config, num_devices: int, num_processes: int) -> None:
    """Checks every value of `config` against its range, and the sizes against one another.

    Raises:
        ConfigError: the first value that does not fit.
    """
    for key, choices in CHOICES.items():
        if lookup(config, key) not in choices:
            _fail(config, key, f"one of {', '.join(sorted(choices))}")
    for key in AT_LEAST_ONE:
        _require(config, key, lambda value: value >= 1, "at least 1")
    for key in SEEDS:
        _require(config, key, lambda value: 0 <= value < 2**32, "at least 0 and below 2**32")
    for key in NOT_NEGATIVE:
        _require(config, key, lambda value: value >= 0, "at least 0")
    for key in POSITIVE:
        _require(config, key, lambda value: value > 0, "a positive number")
    for key in POSITIVE_OR_NONE:
        _require(config, key, lambda value: value is None or value > 0, "a positive number or None")
    for key in FRACTIONS:
        _require(config, key, lambda value: 0 <= value < 1, "a number in [0, 1)")
    _check_sizes(config)
    _check_batch(config, num_devices, num_processes)
    for label in config.sampling.classes:
        if not 0 <= label < config.model.num_classes:
            _fail(config, "sampling.classes", f"classes from 0 to {config.model.num_classes - 1}")


def check_resumable(saved: dict, config) -> None:
    """Refuses to go on with a run under a config that differs in what cannot change.

    Args:
        saved: the config beside the run's checkpoint, as nested dicts.
        config: the config asked for.

    Raises:
        ConfigError: it names every key that differs, with both values.
    """
    current = json.loads(config.to_json())
    differences = []
    for key in FIXED:
        before, now = _flatten(key, _get(saved, key)), _flatten(key, _get(current, key))
        for name in sorted(before.keys() | now.keys()):
            if name not in CHANGEABLE and before.get(name) != now.get(name):
                differences.append(f"config.{name}: {before.get(name)} -> {now.get(name)}")
    if differences:
        raise ConfigError(
            "the workdir holds a run whose config differs in what cannot change: "
            + "; ".join(differences)
            + ". Use the old values, or another --workdir"
        )


def _check_sizes(config) -> None:
    model = config.model
    if model.width % model.num_groups:
        _fail(config, "model.width", f"a multiple of config.model.num_groups={model.num_groups}")
    stride = config.autoencoder.downsampling * model.patch_size
    if config.data.image_size % stride:
        _fail(
            config,
            "data.image_size",
            f"a multiple of {stride} (autoencoder.downsampling * model.patch_size)",
        )
    try:
        buckets = aspect_buckets(config.data)
    except DataError as error:
        raise ConfigError(f"config.data.aspect_buckets: {error}") from error
    if buckets and buckets.side_multiple % stride:
        _fail(
            config,
            "data.aspect_buckets.side_multiple",
            f"a multiple of {stride} (autoencoder.downsampling * model.patch_size)",
        )


def _check_batch(config, num_devices: int, num_processes: int) -> None:
    batch_size, parts = config.train.batch_size, config.train.accumulation_steps
    if batch_size % (parts * num_devices):
        _fail(
            config,
            "train.batch_size",
            f"a multiple of {parts * num_devices} (train.accumulation_steps={parts} times "
            f"{num_devices} devices)",
        )
    if batch_size % num_processes:
        _fail(config, "train.batch_size", f"a multiple of the {num_processes} processes")


def _require(config, key: str, holds, expected: str) -> None:
    if not holds(lookup(config, key)):
        _fail(config, key, expected)


def _fail(config, key: str, expected: str) -> None:
    raise ConfigError(f"config.{key} is {lookup(config, key)!r}; expected {expected}")


def _get(tree: dict, key: str):
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _flatten(prefix: str, tree) -> dict:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(f"{prefix}.{key}", value)
    return flat
