"""A trained model as sampling uses it: configs and names of classes first, weights when needed."""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowdcn_jax.autoencoders import Autoencoder, check_fits, load_autoencoder
from flowdcn_jax.autoencoders.autoencoder import PUBLISHED
from flowdcn_jax.data.prepared import Encoder, find_encoder
from flowdcn_jax.ema import MAIN
from flowdcn_jax.models import abstract_model
from flowdcn_jax.named_weights import find, folder_of, named
from flowdcn_jax.options import takes_options
from flowdcn_jax.precision import compute_dtype
from flowdcn_jax.runs.checkpoint import Weights, checksum, read_run, restore_ema
from flowdcn_jax.runs.sharding import make_mesh, replicated
from flowdcn_jax.sampling.classes import class_words, make_labels, parse_classes
from flowdcn_jax.sampling.generator import (
    Guide,
    copy_to_devices,
    fill_settings,
    generate_images,
    make_generator,
    with_seed,
)
from flowdcn_jax.sampling.named_model import (
    check_can_be_had,
    decoder_folder,
    named_config,
    named_workdir,
    with_published,
)
from flowdcn_jax.sampling.settings import ModelChoice, Request, SamplingError, Settings

SAMPLES_FOLDER = "samples"


class ChosenCheckpoint(NamedTuple):
    """Where weights lie, and what their checkpoint tells without them."""

    workdir: str
    step: int | None  # None: the newest that is whole
    config: ConfigDict  # of the training run
    class_names: tuple[str, ...] | None
    encoder: Encoder | None  # of the latents it was trained on; None: not known, or pixels
    ema: str | None = None  # the name of the EMA; None: the run's main one
    name: str | None = None  # of published weights, whose workdir need not be there yet


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """What a workdir holds for sampling: its config at once, weights when they are first used.

    So a request can be checked before anything large is read, or fetched. `load_trained` makes it.
    """

    mesh: Mesh
    checkpoint: ChosenCheckpoint
    guide_checkpoint: ChosenCheckpoint | None  # of the weaker model of autoguidance
    config: ConfigDict  # the run's, with the autoencoder that decodes
    words: tuple[tuple[str, ...], ...] | None  # of each class
    # Settings of the published figures, of weights by name.
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _generators: dict = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """What decodes, on every device."""
        config, name = self.config.autoencoder, self.checkpoint.name
        if name is not None and config.name in PUBLISHED and config.weights is None:
            config = config.copy_and_resolve_references()
            config.weights = str(decoder_folder(name, config.name))
        autoencoder = load_autoencoder(config)
        check_fits(autoencoder, self.config, origin=self.checkpoint.encoder)
        copied = copy_to_devices(autoencoder.params, self.mesh)
        return dataclasses.replace(autoencoder, params=copied)

    @functools.cached_property
    def weights(self) -> Weights:
        """The EMA weights, on every device."""
        chosen = self.checkpoint
        workdir = chosen.workdir if chosen.name is None else str(named_workdir(chosen.name))
        return _read_weights(workdir, chosen.step, self.mesh, ema=chosen.ema)

    @functools.cached_property
    def guide(self) -> Weights | None:
        """The guide's EMA weights, on every device."""
        chosen = self.guide_checkpoint
        return chosen and _read_weights(chosen.workdir, chosen.step, self.mesh)

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What of the model images depend on; see `describe`."""
        return describe(self.weights, self.guide, self.autoencoder, self.config.autoencoder)

    @property
    def samples(self) -> Path:
        """The folder of its samples' folders, unless told otherwise: never one in the cache."""
        chosen = self.checkpoint
        return (
            Path(SAMPLES_FOLDER, chosen.name)
            if chosen.name
            else Path(chosen.workdir, SAMPLES_FOLDER)
        )

    def fill_settings(self, settings: Settings) -> Settings:
        """The settings with what is None filled in, once they are known to fit model and guide.

        Raises:
            SamplingError: a value that the model or the guide cannot serve.
        """
        chosen = self.guide_checkpoint  # compared with the model as it was trained
        settings = with_published(settings, self.published)
        return fill_settings(settings, self.checkpoint.config, guide=chosen and chosen.config)

    def labels(self, request: Request, *, seed: int) -> np.ndarray:
        """Labels of the images asked for, int32 [num_images]; `seed` is of a random order.

        Raises:
            SamplingError: an unknown class.
        """
        num_classes, chosen, count = self.config.model.num_classes, (), request.num_images
        if request.classes is not None:
            chosen = tuple(parse_classes(request.classes, num_classes, self.words))
        count = self.config.sampling.num_images if count is None else count
        return make_labels(request.labels, chosen, count, num_classes, seed=seed)

    def generator(self, settings: Settings, *, keep: tuple[int, ...] | None = None) -> Callable:
        """`make_generator`'s function for filled settings: compiled once, whatever the seed."""
        program = (dataclasses.replace(settings, seed=None), keep)
        if program not in self._generators:
            autoencoder = self.autoencoder  # its errors come before the weights are read
            guide = self.guide and Guide(self.guide_checkpoint.config, self.guide.params)
            self._generators[program] = make_generator(
                self.checkpoint.config,
                self.mesh,
                settings,
                guide=guide,
                autoencoder=autoencoder,
                keep=keep,
            )
        return with_seed(self._generators[program], settings.seed)

    def round_size(self, num_images: int, *, batch_size: int) -> int:
        """Images that all devices together draw at a time.

        A device's part is the same for any number of devices, as rounding is. So a last round may
        draw copies, on devices that would have nothing to do.
        """
        return min(batch_size, num_images) * self.mesh.size

    def draw(
        self,
        settings: Settings,
        labels: np.ndarray,
        *,
        batch_size: int,
        progress: bool = True,
        keep: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        """Images of `labels` [n], uint8 [n,H,W,C], batch_size or fewer at a time on each device.

        `settings` are filled; image i has index i. With `keep`, trajectories: each image after each
        of these numbers of steps, [n,len(keep),H,W,C].
        """
        _, images = generate_images(
            self.generator(settings, keep=keep),
            self.weights.params,
            labels,
            batch_size=self.round_size(len(labels), batch_size=batch_size),
            progress=progress,
        )
        return images


@takes_options
def load_trained(
    workdir: str | Path, choice: ModelChoice, *, mesh: Mesh | None = None
) -> TrainedModel:
    """The EMA weights of a run, and of a guide if one is named, on every device of `mesh`.

    Only configs are read at first; see `TrainedModel`.

    Args:
        workdir: the --workdir of the training run; or the name of published weights, which are
            fetched and converted when they are first needed, and draw with the settings of their
            published figures. A folder of that name comes first.
        mesh: all devices of all processes by default.
        OPTIONS

    Raises:
        SamplingError: a value out of range.
        flowdcn_jax.runs.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
        flowdcn_jax.named_weights.NamedWeightsError: a name of other weights than a model's.
    """
    published = {}
    if named(workdir):
        chosen = _choose_named(os.fspath(workdir), choice)
        published = find(chosen.name).settings
    else:
        chosen = _choose_checkpoint(workdir, choice.step, ema=choice.ema)
    guide = None
    if choice.guide_workdir is not None or choice.guide_step is not None:
        guide = _choose_checkpoint(choice.guide_workdir or workdir, choice.guide_step)
    return TrainedModel(
        mesh=make_mesh() if mesh is None else mesh,
        checkpoint=chosen,
        guide_checkpoint=guide,
        config=_with_autoencoder(chosen.config, choice.autoencoder, choice.autoencoder_weights),
        words=class_words(chosen.config.model.num_classes, chosen.class_names),
        published=published,
    )


def load_model(workdir: str | Path, step: int | None = None) -> tuple[nnx.Module, ConfigDict]:
    """The model of a training run with its EMA weights, and the run's config.

    Args:
        workdir: the --workdir of the run, or the name of published weights.
        step: the checkpoint to read; the newest by default.

    Returns:
        (model, config): model(x [B,H,W,C], t [B], y [B]) -> velocity [B,H,W,C].

    Raises:
        flowdcn_jax.runs.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    if named(workdir):
        workdir = named_workdir(os.fspath(workdir))
    weights = _read_weights(str(workdir), step, make_mesh(devices=jax.local_devices()[:1]))
    graphdef, _ = abstract_model(weights.config.model)
    return nnx.merge(graphdef, weights.params), weights.config


def describe(
    weights: Weights,
    guide: Weights | None,
    autoencoder: Autoencoder,
    autoencoder_config: ConfigDict,
) -> dict[str, Any]:
    """What of a model images depend on, as JSON takes it: the same record, the same images."""

    def network(weights: Weights) -> dict[str, Any]:
        return {
            "step": weights.step,
            "checksum": digest(checksum(weights.params)),
            "config": _resolved(weights.config.model),
            "image_size": weights.config.data.image_size,  # resolution adjustments start from it
        }

    decoder = _resolved(autoencoder_config)
    decoder.pop("weights", None)  # where they lie; their digest says which they are
    return {
        "model": network(weights),
        "guide": guide and network(guide),
        "autoencoder": decoder
        | {
            "weights_sha256": autoencoder.weights_sha256,
            "scale": autoencoder.scale,
            "shift": autoencoder.shift,
        },
    }


def digest(tree: Any) -> str:
    """Eight hexadecimal digits that tell a JSON value from others."""
    return f"{zlib.crc32(json.dumps(tree, sort_keys=True).encode()):08x}"


def _resolved(section: ConfigDict) -> dict[str, Any]:
    """A section of a config with the dtype that "auto" stands for on these devices."""
    dtype = np.dtype(compute_dtype(section.dtype)).name
    return json.loads(section.to_json()) | {"dtype": dtype}


def _read_weights(workdir: str, step: int | None, mesh: Mesh, *, ema: str | None = None) -> Weights:
    """The weights of an EMA, copied to every device of `mesh`."""

    def abstract_params(config: ConfigDict):
        _, params = abstract_model(config.model)
        sharding = replicated(mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params
        )

    return restore_ema(workdir, step, abstract_params, name=ema or MAIN)


def _choose_checkpoint(
    workdir: str | Path, step: int | None, *, ema: str | None = None
) -> ChosenCheckpoint:
    run = read_run(str(workdir), step, name=ema or MAIN)
    config = ConfigDict(run.config)
    identity = run.data_identity
    encoder = find_encoder(identity) if identity and "settings" in identity else None
    return ChosenCheckpoint(str(workdir), step, config, run.class_names, encoder, ema)


def _choose_named(name: str, choice: ModelChoice) -> ChosenCheckpoint:
    """Published weights: one checkpoint, with one EMA, of which nothing need be there yet."""
    for option, least in (("step", 0), ("ema", MAIN)):
        if (value := getattr(choice, option)) not in (None, least):
            raise SamplingError(f"{option} is {value!r}; expected none: {name} has one checkpoint")
    if choice.guide_step is not None and choice.guide_workdir is None:
        raise SamplingError(
            f"guide_step is {choice.guide_step} without guide_workdir; expected both: {name} has "
            "one checkpoint"
        )
    config = named_config(name)
    check_can_be_had(name)
    return ChosenCheckpoint(str(folder_of(name)), None, config, None, None, None, name)


def _with_autoencoder(config: ConfigDict, name: str | None, weights: Path | None) -> ConfigDict:
    """A copy of a run's config that decodes with another autoencoder, or with weights elsewhere.

    Another `name` has its own weights: those of the config are then left out.
    """
    config = config.copy_and_resolve_references()
    if name not in (None, config.autoencoder.name):
        config.autoencoder.update(name=name, weights=None)
    if weights is not None:
        config.autoencoder.weights = str(weights)
    return config
