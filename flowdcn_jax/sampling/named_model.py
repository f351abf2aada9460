"""Models by name: fetched and converted when their weights are first needed, and not before."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from flowdcn_jax import named_weights
from flowdcn_jax.config import load_config
from flowdcn_jax.named_weights.table import DECODER, MODEL, NamedWeightsError
from flowdcn_jax.published_weights import convert
from flowdcn_jax.published_weights.metadata import fit_config
from flowdcn_jax.published_weights.weights_file import check_readable
from flowdcn_jax.sampling.settings import Settings

WORKDIR = "workdir"  # in what was made of a name's files


def named_config(name: str) -> ConfigDict:
    """The config that a named model's workdir has, without fetching anything.

    Its autoencoder is the one that decodes; where its weights lie `decoder_folder` says.

    Raises:
        NamedWeightsError: no such name of a model.
    """
    weights = named_weights.find(name, MODEL)
    config = _training_config(name)
    fit_config(config, {}, boundary=None)
    config.autoencoder.name = named_weights.find(weights.decoder, DECODER).of
    return config


def named_workdir(name: str, *, accept_change: bool = False) -> Path:
    """The workdir of a named model, fetched and converted if it is not there.

    Args:
        name: of the table.
        accept_change: see `named_weights.fetch`.

    Raises:
        NamedWeightsError: see `named_weights.fetch`; or several processes would do it at once.
        flowdcn_jax.published_weights.PublishedWeightsError: the file cannot be converted, as
            without PyTorch.
    """
    check_can_be_had(name, anew=accept_change)
    (file,) = named_weights.find(name, MODEL).files

    def make(files: Mapping[str, Path], folder: Path) -> None:
        print(f"converting {file.name}, once", file=sys.stderr)
        convert(files[file.name], _training_config(name), folder / WORKDIR)

    return named_weights.prepared(name, make, accept_change=accept_change) / WORKDIR


def decoder_folder(name: str, autoencoder: str | None = None) -> Path:
    """The folder of the files that decode what a named model draws, fetched if they are not there.

    Args:
        name: of the model.
        autoencoder: another than its own, by its name in config.autoencoder.
    """
    decoder = named_weights.find(name, MODEL).decoder
    if autoencoder not in (None, named_weights.find(decoder).of):
        decoder = next(
            each for each, weights in named_weights.TABLE.items() if weights.of == autoencoder
        )
    files = named_weights.fetch(decoder)
    return next(iter(files.values())).parent


def with_published(
    settings: Settings, published: Mapping[str, object], *, through: str | None = None
) -> Settings:
    """Settings with those of the published figures in the place of None.

    The length of the last step goes with the sampler and the number of steps: where one of these
    is given, it is not taken over.

    Args:
        settings: what was asked for.
        published: of the weights' name; {} without one.
        through: a field that a comparison goes through, which stays None.
    """
    given = {name for name in published if getattr(settings, name) is not None} | {through}
    if given & {"sampler", "num_steps"}:
        given.add("last_step")
    return dataclasses.replace(
        settings, **{name: value for name, value in published.items() if name not in given}
    )


def _training_config(name: str) -> ConfigDict:
    """The config in configs/, as the conversion takes it."""
    weights = named_weights.find(name, MODEL)
    config = load_config(weights.config)
    config.data.image_size = weights.resolution
    config.sampling.classes = ()
    return config


def check_can_be_had(name: str, *, anew: bool = False) -> None:
    """Finds out before anything is fetched whether the conversion can be made here.

    Args:
        name: of the model.
        anew: whether it is made even if it is there.

    Raises:
        NamedWeightsError: no such name of a model; or several processes would do it at once.
        flowdcn_jax.published_weights.PublishedWeightsError: PyTorch is needed, and missing.
    """
    (file,) = named_weights.find(name, MODEL).files
    if named_weights.is_prepared(name) and not anew:
        return
    check_readable(file.name)
    if jax.process_count() > 1:
        raise NamedWeightsError(
            f"{name} is not in the cache, and a job of several processes does not fetch; expected "
            f"python -m flowdcn_jax.tools.weights fetch {name} first"
        )
