"""The config: every key with its default, range and unit, and the checks that follow from them.

A config is an ml_collections.ConfigDict of the sections below. The files in configs/, and a user's
own, begin with `default_config()` or another file's `load_config(NAME)` and change a few keys; on
the command line --config.SECTION.KEY=VALUE sets any of them. `config.model` holds the options of
the model that it names, which stand beside the network in flowdcn_jax/models.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, config_dict

from flowdcn_jax import ema
from flowdcn_jax.config_flow import Flow, MeanFlow, check_objective
from flowdcn_jax.errors import ConfigError, UserError
from flowdcn_jax.files import local_path_text
from flowdcn_jax.models import find_model, read_options
from flowdcn_jax.options import (
    FRACTION,
    POSITIVE,
    SEED,
    Option,
    at_least,
    name_in,
    one_of,
    option,
    options_of,
)
from flowdcn_jax.precision import DTYPES


@dataclasses.dataclass
class Run:
    """Keys of no section."""

    seed: int = option(
        0, "of initial values, data order, noise, times and dropped labels", SEED, fixed=True
    )


@dataclasses.dataclass
class Data:
    """config.data"""

    name: str = option("latents", "data set", name_in("flowdcn_jax.data:SOURCES"), fixed=True)
    data_dir: str | None = option(
        None, "folder of prepared data sets; None: TFDS's default", parse=local_path_text
    )
    split: str = option("train", "TFDS split, or a slice of one", fixed=True)
    image_size: int = option(
        256, "side of the images, or root of the buckets' area, pixels", at_least(1), fixed=True
    )
    random_flip: bool = option(True, "mirror half of the visits", fixed=True)
    num_threads: int = option(4, "reader threads a process", at_least(1))
    prefetch_batches: int = option(
        8, "batches read ahead a process, in the host's memory", at_least(1)
    )


@dataclasses.dataclass
class AspectBuckets:
    """config.data.aspect_buckets: VAR training, on latents cached with --aspect_buckets"""

    count: int = option(
        0, "aspects, evenly spaced; 0: square images alone", at_least(0), fixed=True
    )
    min_aspect: float = option(0.5, "width / height of the tallest", fixed=True)
    max_aspect: float = option(3.0, "width / height of the widest", fixed=True)
    side_multiple: int = option(16, "sides are rounded down to it, pixels", fixed=True)


@dataclasses.dataclass
class Autoencoder:
    """config.autoencoder"""

    name: str = option(
        "preview",
        "identity: the model works on pixels; preview: on latents, shown without a decoder; or a "
        "decoder of latents",
        name_in("flowdcn_jax.autoencoders:AUTOENCODERS"),
    )
    weights: str | None = option(
        None, "its safetensors file, or the folder that holds it", parse=local_path_text
    )
    downsampling: int = option(8, "image pixels a latent pixel, each side", at_least(1))
    dtype: str = option("float32", "compute dtype; auto as in model.dtype", one_of(*DTYPES))


@dataclasses.dataclass
class Train:
    """config.train"""

    batch_size: int = option(
        256, "images a step, on all devices of all hosts together", at_least(1), fixed=True
    )
    num_steps: int = option(400_000, "steps of the run", at_least(1))
    accumulation_steps: int = option(1, "micro-batches a step; divides batch_size", at_least(1))


@dataclasses.dataclass
class Optimizer:
    """config.optimizer; docs/training.md has its formulas"""

    name: str = option(
        "adamw",
        "adamw; or muon, for the matrices of the blocks, and Adam for the rest",
        name_in("flowdcn_jax.runs.optimizer:OPTIMIZERS"),
        fixed=True,
    )
    learning_rate: float = option(1e-4, "after warm-up", POSITIVE)
    warmup_steps: int = option(0, "linear from 0; within train.num_steps", at_least(0))
    schedule: str = option(
        "constant", "after warm-up", name_in("flowdcn_jax.runs.optimizer:SCHEDULES")
    )
    final_learning_rate: float = option(
        0.0, "at the end of the run, of cosine and linear", at_least(0)
    )
    weight_decay: float = option(
        0.0, "of kernels: not of biases, norms, embeddings and scale priors", at_least(0)
    )
    b1: float = option(0.9, "Adam's decay of the first moment", FRACTION)
    b2: float = option(0.999, "Adam's decay of the second moment", FRACTION)
    epsilon: float = option(1e-8, "added to the root of the second moment", POSITIVE)
    clip_norm: float | None = option(None, "global gradient norm; None: no clipping", POSITIVE)


@dataclasses.dataclass
class Ema:
    """config.ema: moving averages of the parameters"""

    decay: float = option(0.9999, "of the one that grids show, named ema", FRACTION)
    warmup: float = option(
        0.0,
        "constant decays begin lower: a half-life of at most this share of the steps done, in EDM "
        "0.05; 0: they do not",
        FRACTION,
    )
    others: tuple = option(
        (),
        "more of them, for sample.py --ema=NAME: constant_DECAY, or power_WIDTH, of a standard "
        "deviation of this share of the steps done",
        parse=ema.parse_names,
    )


@dataclasses.dataclass
class Mesh:
    """config.mesh: the product is the number of devices; -1: what the other leaves"""

    data: int = option(-1, "copies of the parameters")
    fsdp: int = option(1, "devices that share one copy")


@dataclasses.dataclass
class Checkpoint:
    """config.checkpoint"""

    every_steps: int = option(10_000, "between checkpoints", at_least(1))
    every_minutes: float | None = option(
        30.0,
        "wall time after which one is saved in between, with the next line of metrics; None: never",
        POSITIVE,
    )
    keep: int = option(3, "newest checkpoints kept", at_least(1))
    keep_every_steps: int | None = option(
        None, "kept for ever, every so many; None: no such step", POSITIVE
    )


@dataclasses.dataclass
class Log:
    """config.log"""

    every_steps: int = option(100, "between lines of metrics", at_least(1))
    sample_every_steps: int = option(10_000, "between grids of EMA samples; 0: never", at_least(0))
    wandb_project: str | None = option(
        None, "Weights & Biases project to log to as well; None: not there"
    )


@dataclasses.dataclass
class Sampling:
    """config.sampling: of the grids in training; also what sample.py draws unless told"""

    num_images: int = option(64, "images of the grid", at_least(1))
    num_steps: int = option(50, "solver steps", at_least(1))
    guidance: float = option(1.375, "weight w; 1: none", at_least(0))
    seed: int = option(0, "of the noise", SEED)
    classes: tuple = option(
        (207, 360, 387, 974, 88, 979, 417, 279),
        "of the grid alone: class numbers in turn; (): all classes",
    )


@dataclasses.dataclass
class Evaluate:
    """config.evaluate: figures of EMA samples of all classes in turn, in training"""

    every_steps: int = option(0, "between evaluations; 0: never", at_least(0))
    num_images: int = option(5_000, "samples of each", at_least(2))
    num_steps: int | None = option(
        None, "solver steps; None: those of config.sampling", at_least(1)
    )
    guidance: float | None = option(
        None, "weight w, 1: none; None: that of config.sampling", at_least(0)
    )
    features: str = option(
        "inception",
        "the network that sees them",
        name_in("flowdcn_jax.evaluation.features:NETWORKS"),
    )
    weights: str | None = option(
        None, "its safetensors file, or the folder that holds it", parse=local_path_text
    )
    reference: str | None = option(
        None, "images or statistics, as of evaluate.py; None: the images that training sees"
    )


SECTIONS = {
    "": Run,
    "data": Data,
    "data.aspect_buckets": AspectBuckets,
    "autoencoder": Autoencoder,
    "train": Train,
    "flow": Flow,
    "flow.mean_flow": MeanFlow,
    "optimizer": Optimizer,
    "ema": Ema,
    "mesh": Mesh,
    "checkpoint": Checkpoint,
    "log": Log,
    "sampling": Sampling,
    "evaluate": Evaluate,
}

# Key -> {a value's name in older versions: its name now}.
RENAMED = {
    "data.name": {"imagenet_latents": "latents"},
    "autoencoder.name": {"none": "preview"},
}


def default_config() -> ConfigDict:
    """FlowDCN-S/2 on 256x256 latents as published: every key's default.

    It is locked: a misspelled key is an error, in files as on the command line.
    """
    nested: dict[str, Any] = {"model": model_config("flowdcn")}
    for section, kind in SECTIONS.items():
        keys = nested
        for part in filter(None, section.split(".")):
            keys = keys.setdefault(part, {})
        for name, declared in options_of(kind).items():
            empty = declared.default is None
            keys[name] = config_dict.placeholder(declared.type) if empty else declared.default
    return ConfigDict(nested).lock()


def model_config(name: str) -> dict:
    """config.model of a model of `flowdcn_jax.models.MODELS`, of the S/2 size.

    Raises:
        ConfigError: there is none of this name.
    """
    declared = options_of(find_model(name).options)
    return {"name": name} | {key: each.default for key, each in declared.items()}


def configs_folder() -> Path:
    """Where the project's own config files are: beside the package, or in it once installed."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """The project's own configs: "xl2", "sit_s2" and so on."""
    return sorted(path.stem for path in configs_folder().glob("*.py"))


def load_config(name: str) -> ConfigDict:
    """One of the project's own configs, by its name: "xl2" is configs/xl2.py.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in config_names():
        raise ConfigError(f"no config {name!r}; expected one of {', '.join(config_names())}")
    return config_module(name).get_config()


def config_module(name: str) -> ModuleType:
    """The file of one of the project's own configs, run; its docstring says what it costs."""
    path = configs_folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"flowdcn_jax.configs.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modernise(config: Any) -> Any:
    """Puts today's names into a config, or a dict with some of its sections; returns it."""
    for key, names in RENAMED.items():
        section, _, name = key.partition(".")
        if section in config and name in (config[section] or ()):
            value = config[section][name]
            config[section][name] = names.get(value, value)
    return config


def validate(config, num_devices: int, num_processes: int) -> None:
    """Checks every value of `config` against its range, and the values against one another.

    Raises:
        ConfigError: the first value that does not fit.
    """
    check_keys(config)
    for key, declared in _options():
        declared.value(lookup(config, key), name=f"config.{key}", error=ConfigError)
    read_options(config.model)
    _check_sizes(config)
    _check_batch(config, num_devices, num_processes)
    if config.optimizer.warmup_steps > config.train.num_steps:
        _fail(config, "optimizer.warmup_steps", f"at most train.num_steps={config.train.num_steps}")
    check_classes(config)
    check_objective(config)


def check_classes(config) -> None:
    """The classes of grids must be the model's.

    Raises:
        ConfigError: one is not.
    """
    classes = config.model.num_classes
    for label in config.sampling.classes:
        if type(label) is not int or not 0 <= label < classes:
            _fail(config, "sampling.classes", f"class numbers from 0 to {classes - 1}")


def check_keys(config) -> None:
    """Every key is there, and no other; under model those of its model.

    Raises:
        ConfigError: a key that is missing or unknown.
    """
    found = flatten(config)
    if "model.name" not in found:
        raise ConfigError("config.model.name is missing; expected the name of a model")
    of_model = options_of(find_model(config.model.name).options)
    expected = {key for key, _ in _options()} | {f"model.{key}" for key in (*of_model, "name")}
    for key in sorted(expected - found.keys()):
        raise ConfigError(
            f"config.{key} is missing; expected every key that flowdcn_jax/config.py and the model "
            f"{config.model.name!r} have. Start from one of the files in configs/"
        )
    for key in sorted(found.keys() - expected):
        if not key.startswith("model."):  # `read_options` lists those of the model
            raise ConfigError(
                f"config.{key} is unknown; expected the keys of flowdcn_jax/config.py"
            )
    read_options(config.model)


def fixed_keys(model: str) -> set[str]:
    """The keys whose values a run keeps for good, for a model of this name."""
    of_model = options_of(find_model(model).options).items()
    declared = [*_options(), *((f"model.{key}", each) for key, each in of_model)]
    return {"model.name"} | {key for key, each in declared if each.fixed}


def optional_keys() -> set[str]:
    """The keys of which None is a value."""
    return {key for key, declared in _options() if declared.optional}


def lookup(config, key: str) -> Any:
    """config.a.b for the key "a.b"."""
    for part in key.split("."):
        config = config[part]
    return config


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a config, also a saved one of nested dicts, by dotted key."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict | ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _options() -> Iterator[tuple[str, Option]]:
    """All keys but those of config.model, dotted, with what is declared of them."""
    for section, kind in SECTIONS.items():
        for name, declared in options_of(kind).items():
            yield f"{section}.{name}".lstrip("."), declared


def _check_sizes(config) -> None:
    from flowdcn_jax.data import aspect_buckets  # heavy, and config files need the rest alone

    stride = config.autoencoder.downsampling * config.model.patch_size
    expected = f"a multiple of {stride} (autoencoder.downsampling * model.patch_size)"
    if config.data.image_size % stride:
        _fail(config, "data.image_size", expected)
    try:
        buckets = aspect_buckets(config.data)
    except UserError as error:
        raise ConfigError(f"config.data.aspect_buckets: {error}") from error
    if buckets and buckets.side_multiple % stride:
        _fail(config, "data.aspect_buckets.side_multiple", expected)


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


def _fail(config, key: str, expected: str) -> None:
    raise ConfigError(f"config.{key} is {lookup(config, key)!r}; expected {expected}")
