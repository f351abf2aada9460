"""A trained model as sampling uses it: configs and names of classes first, weights when needed."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flowdcn_jax.autoencoders import Autoencoder, check_fits, load_autoencoder
from flowdcn_jax.data.manifest import Encoder, find_encoder
from flowdcn_jax.runs import checkpoint
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.sampling.classes import class_words, make_labels, parse_classes
from flowdcn_jax.sampling.generator import (
    check_guide,
    copy_to_devices,
    load_weights,
    make_generator,
)
from flowdcn_jax.sampling.request import Request
from flowdcn_jax.sampling.settings import Settings


class Source(NamedTuple):
    """Where weights come from, and what their checkpoint tells without them."""

    workdir: str
    step: int | None  # None: the newest that is whole
    config: ConfigDict  # of the training run
    class_names: tuple[str, ...] | None
    encoder: Encoder | None  # of the latents it was trained on; None: not known, or pixels
    ema: str = "ema"  # the name of the EMA


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """What a workdir holds for sampling: its config at once, weights when they are first used.

    So a request can be checked before anything large is read. `load_trained` makes it.
    """

    mesh: Mesh
    source: Source
    guide_source: Source | None  # of the weaker model of autoguidance
    config: ConfigDict  # the run's, with the autoencoder that decodes
    words: tuple[tuple[str, ...], ...] | None  # of each class
    _generators: dict[Settings, Callable] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """What decodes, on every device."""
        autoencoder = load_autoencoder(self.config.autoencoder)
        check_fits(autoencoder, self.config, origin=self.source.encoder)
        copied = copy_to_devices(autoencoder.params, self.mesh)
        return dataclasses.replace(autoencoder, params=copied)

    @functools.cached_property
    def weights(self) -> checkpoint.Weights:
        """The EMA weights, on every device."""
        source = self.source
        return load_weights(source.workdir, source.step, self.mesh, ema=source.ema)

    @functools.cached_property
    def guide(self) -> checkpoint.Weights | None:
        """The guide's EMA weights, on every device."""
        if self.guide_source is None:
            return None
        return load_weights(self.guide_source.workdir, self.guide_source.step, self.mesh)

    def fill_settings(self, settings: Settings) -> Settings:
        """The settings with what is None filled in, once they are known to fit model and guide.

        Raises:
            SamplingError: a value that the model or the guide cannot serve.
        """
        settings = settings.for_model(self.config)
        if self.guide_source is not None:
            check_guide(self.source.config, self.guide_source.config, settings)
        return settings

    def labels(self, request: Request, *, seed: int) -> np.ndarray:
        """Labels of the images asked for, int32 [num_images]; `seed` is of a random order.

        Raises:
            SamplingError: an unknown class.
        """
        options, num_classes = self.config.sampling, self.config.model.num_classes
        chosen, count = tuple(options.classes), request.num_images
        if request.classes is not None:
            chosen = tuple(parse_classes(request.classes, num_classes, self.words))
        count = options.num_images if count is None else count
        return make_labels(request.labels, chosen, count, num_classes, seed=seed)

    def generator(self, settings: Settings) -> Callable:
        """`make_generator`'s function for filled settings: compiled once, however often asked."""
        if settings not in self._generators:
            autoencoder = self.autoencoder  # its errors come before the weights are read
            self._generators[settings] = make_generator(
                self.source.config, self.mesh, settings, guide=self.guide, autoencoder=autoencoder
            )
        return self._generators[settings]


def load_trained(
    workdir: str | Path,
    *,
    step: int | None = None,
    ema: str = "ema",
    guide_workdir: str | Path | None = None,
    guide_step: int | None = None,
    autoencoder: str | None = None,
    autoencoder_weights: str | Path | None = None,
    mesh: Mesh | None = None,
) -> TrainedModel:
    """The EMA weights of a run, and of a guide if one is named, on every device of `mesh`.

    Only configs are read at first; see `TrainedModel`.

    Args:
        workdir: the --workdir of the training run.
        step: its checkpoint; None: the newest.
        ema: the name of the EMA: ema, one of config.ema.others, or one made after training.
        guide_workdir: the run of the guide; None: `workdir`, if guide_step is given.
        guide_step: the guide's checkpoint; None: the newest, if guide_workdir is given.
        autoencoder: what decodes; None: the run's.
        autoencoder_weights: its file or folder; None: the run's, if the run names this autoencoder.
        mesh: all devices of all processes by default.

    Raises:
        flowdcn_jax.runs.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    source, guide_source = _read_source(workdir, step, ema), None
    if guide_workdir is not None or guide_step is not None:
        guide_source = _read_source(guide_workdir or workdir, guide_step)
    return TrainedModel(
        mesh=make_mesh() if mesh is None else mesh,
        source=source,
        guide_source=guide_source,
        config=_with_autoencoder(source.config, autoencoder, autoencoder_weights),
        words=class_words(source.config.model.num_classes, source.class_names),
    )


def _read_source(workdir: str | Path, step: int | None, ema: str = "ema") -> Source:
    run = checkpoint.read_run(str(workdir), step, name=ema)
    identity = run.data_identity
    encoder = find_encoder(identity) if identity and "settings" in identity else None
    return Source(str(workdir), step, ConfigDict(run.config), run.class_names, encoder, ema)


def _with_autoencoder(config: ConfigDict, name: str | None, weights) -> ConfigDict:
    """A copy of a run's config that decodes with another autoencoder, or with weights elsewhere.

    Another `name` has its own weights: those of the config are then left out.
    """
    config = config.copy_and_resolve_references()
    if name not in (None, config.autoencoder.name):
        config.autoencoder.update(name=name, weights=None)
    if weights is not None:
        config.autoencoder.weights = str(weights)
    return config
