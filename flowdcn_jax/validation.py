"""Checks of a config, made before any work starts. Each error names the key, value and remedy."""

import json

from ml_collections import ConfigDict

from flowdcn_jax.autoencoders import AUTOENCODERS
from flowdcn_jax.data import SOURCES, BucketedSource, DataError, DataSource, aspect_buckets
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.flow.path import TIME_DISTRIBUTIONS
from flowdcn_jax.models import MODELS, layers, model_options
from flowdcn_jax.models.flowdcn import SCALE_PRIORS
from flowdcn_jax.training.checkpoint import SavedRun

# A run may go on with other values of these; everything else under model and data is fixed.
CHANGEABLE = {
    "model.dtype",
    "model.remat",
    "data.data_dir",
    "data.num_threads",
    "data.prefetch_batches",
}
FIXED = ("seed", "model", "data", "train.batch_size")
FIXED_BY_WEIGHTS = ("model",)  # of converted weights, that no training has gone on from yet

# Keys that config.data got after runs had been saved, with the values that mean what those did.
# (`model_options` has those of config.model; the other fixed keys were always there.)
ADDED_TO_DATA = {"aspect_buckets": {"count": 0}}
# Keys that config.data has no more; `check_same_data` looks at this one.
REMOVED_FROM_DATA = ("latent_scale",)

CHOICES = {
    "model.boundary": ("zeros", "truncate"),
    "model.norm": tuple(layers.NORMS),
    "model.mlp": tuple(layers.MLPS),
    "model.scale_prior": tuple(SCALE_PRIORS),
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
    "model.num_heads",
    "model.kernel_size",
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
MULTIPLES = (("model.width", "model.num_groups"), ("model.width", "model.num_heads"))
SEEDS = ("seed", "sampling.seed")  # JAX keeps 32 bits of a seed without its 64-bit mode
NOT_NEGATIVE = (
    "data.aspect_buckets.count",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "log.sample_every_steps",
    "sampling.guidance",
)
POSITIVE = ("model.max_scale", "optimizer.learning_rate", "optimizer.epsilon")
POSITIVE_OR_NONE = ("optimizer.clip_norm", "checkpoint.keep_every_steps")
FRACTIONS = ("flow.label_dropout", "optimizer.b1", "optimizer.b2", "ema.decay")
# Looked at elsewhere, or fine with any value.
OTHERS = (
    "model.name",
    "data.data_dir",
    "data.split",
    "data.random_flip",
    "data.aspect_buckets.min_aspect",
    "data.aspect_buckets.max_aspect",
    "data.aspect_buckets.side_multiple",
    "autoencoder.weights",
    "mesh.data",
    "mesh.fsdp",
    "sampling.classes",
)


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
    check_keys(config)
    for key, choices in CHOICES.items():
        _require(config, key, lambda v, c=choices: v in c, f"one of {', '.join(sorted(choices))}")
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


def check_keys(config) -> None:
    """Every key of configs/default.py is there, and no other; under model those of its model.

    Raises:
        ConfigError: a key that is missing or unknown.
    """
    tables = (CHOICES, AT_LEAST_ONE, SEEDS, NOT_NEGATIVE, POSITIVE, POSITIVE_OR_NONE, FRACTIONS)
    known = {key for table in (*tables, OTHERS) for key in table}
    found = {key.removeprefix("config.") for key in _flatten("config", config)}
    expected = {key for key in known if not key.startswith("model.")} | {"model.name"}
    for key in sorted(expected - found):
        raise ConfigError(f"config.{key} is missing; expected every key of configs/default.py")
    for key in sorted(found - expected):
        if not key.startswith("model."):
            raise ConfigError(f"config.{key} is unknown; expected the keys of configs/default.py")
    _check_model_keys(config)


def check_resumable(saved: dict, config, *, weights_only: bool = False) -> None:
    """Refuses to go on with a run under a config that differs in what cannot change.

    Args:
        saved: the config beside the run's checkpoint, as nested dicts.
        config: the config asked for.
        weights_only: the checkpoint holds converted weights; then only the model is fixed.

    Raises:
        ConfigError: it names every key that differs, with both values.
    """
    saved, current = _in_todays_keys(saved), _in_todays_keys(json.loads(config.to_json()))
    differences = []
    for key in FIXED_BY_WEIGHTS if weights_only else FIXED:
        differences += _differences(f"config.{key}", _get(saved, key), _get(current, key))
    if differences:
        raise ConfigError(
            "the workdir holds a run whose config differs in what cannot change: "
            + "; ".join(differences)
            + ". Use the old values, or another --workdir"
        )


def check_same_data(saved: SavedRun, source: DataSource | BucketedSource) -> None:
    """Refuses to go on with a run on other data, whatever the names of folders.

    A run that was saved before data sets had identities may go on with any data; but its latents
    were multiplied by its own config.data.latent_scale, which must be their encoder's scale.

    Args:
        saved: what the run's checkpoint tells.
        source: the data asked for.

    Raises:
        ConfigError: it names what differs.
    """
    if saved.weights_only:
        return
    differences = []
    if saved.data_identity is not None:
        differences = _differences("data", saved.data_identity, source.identity)
    elif source.encoder is not None and "latent_scale" in saved.config["data"]:
        before = {"scale": saved.config["data"]["latent_scale"], "shift": 0}
        now = {"scale": source.encoder.scale, "shift": source.encoder.shift}
        differences = _differences("latents", before, now)
    if differences:
        raise ConfigError(
            "the workdir holds a run on other data than config.data.data_dir gives: "
            + "; ".join(differences)
            + ". Use the old data, or another --workdir"
        )


def _check_model_keys(config) -> None:
    """config.model holds the options of the model that it names, and no others."""
    name = config.model.name
    if name not in MODELS:
        _fail(config, "model.name", f"one of {', '.join(sorted(MODELS))}")
    options = model_options(name)
    for key in config.model:
        if key not in options:
            raise ConfigError(
                f"config.model.{key} is {config.model[key]!r}; expected no such key, for the model "
                f"{name!r} has {', '.join(sorted(options))}. Start from one of its own configs"
            )
    for key, default in options.items():
        if key not in config.model and default is None:
            raise ConfigError(
                f"config.model.{key} is missing; the model {name!r} needs it. Start from one of "
                "its own configs"
            )


def _check_sizes(config) -> None:
    for key, divisor in MULTIPLES:
        if _applies(config, divisor) and lookup(config, key) % lookup(config, divisor):
            _fail(config, key, f"a multiple of config.{divisor}={lookup(config, divisor)}")
    if config.model.name == "sit" and config.model.width % 4:
        _fail(config, "model.width", "a multiple of 4, for the position embedding")
    if _applies(config, "model.kernel_size") and config.model.kernel_size % 2 == 0:
        _fail(config, "model.kernel_size", "an odd number")
    stride = config.autoencoder.downsampling * config.model.patch_size
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
    if not _applies(config, key):
        return
    try:
        fits = holds(lookup(config, key))
    except TypeError:  # a value that has no order, or none with numbers
        fits = False
    if not fits:
        _fail(config, key, expected)


def _applies(config, key: str) -> bool:
    """False for the options of other models, which `_check_model_keys` keeps out."""
    section, _, name = key.partition(".")
    return section != "model" or name in config.model


def _fail(config, key: str, expected: str) -> None:
    raise ConfigError(f"config.{key} is {lookup(config, key)!r}; expected {expected}")


def _in_todays_keys(saved: dict) -> dict:
    """A config with the options that were added after it was saved, without those removed since."""
    defaults = model_options(saved["model"]["name"])
    model = {key: value for key, value in defaults.items() if value is not None} | saved["model"]
    data = ADDED_TO_DATA | saved["data"]
    data = {key: value for key, value in data.items() if key not in REMOVED_FROM_DATA}
    if not data["aspect_buckets"]["count"]:  # the rest of the section means nothing then
        data["aspect_buckets"] = {"count": 0}
    return saved | {"model": model, "data": data}


def _differences(prefix: str, before, now) -> list[str]:
    """What differs between two nested dicts: "prefix.key: old -> new" each."""
    before, now = _flatten(prefix, before), _flatten(prefix, now)
    return [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name.removeprefix("config.") not in CHANGEABLE and before.get(name) != now.get(name)
    ]


def _get(tree: dict, key: str):
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _flatten(prefix: str, tree) -> dict:
    if not isinstance(tree, (dict, ConfigDict)):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(f"{prefix}.{key}", value)
    return flat
