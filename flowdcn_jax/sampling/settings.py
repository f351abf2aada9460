"""Every option of sampling, declared once.

sample.py's flags, the keywords of `generate` and `load_trained` and the tables of docs/sampling.md
follow from here. Imports no JAX, so that --help and usage errors come at once.
"""

import csv
import dataclasses
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowdcn_jax.errors import UserError
from flowdcn_jax.options import (
    POSITIVE,
    SEED,
    Range,
    at_least,
    checked,
    name_in,
    one_of,
    option,
)

COMPARED_IMAGES = 4  # rows of a strip, by default


class SamplingError(UserError, ValueError):
    """A request that the model cannot serve; the message names the value and the choices."""


def _parse_size(given: Any) -> tuple[int, int]:
    """(height, width) of "HxW", or of two whole numbers."""
    if isinstance(given, str):
        height, width = map(int, given.split("x"))
    else:
        height, width = map(operator.index, given)
    return height, width


def _parse_interval(given: Any) -> tuple[float, float]:
    """(low, high) of "LOW,HIGH", or of two numbers."""
    low, high = map(float, given.split(",") if isinstance(given, str) else given)
    return low, high


def _parse_classes(given: Any) -> tuple[str, ...]:
    """Names and numbers: of one, of a sequence of them, or of a text with commas between them."""
    if isinstance(given, str):
        try:
            given = next(csv.reader([given], skipinitialspace=True))  # "..." around commas
        except csv.Error as error:
            raise ValueError from error
    elif not isinstance(given, Iterable):
        given = [given]
    return tuple(str(each).strip() for each in given)


def _parse_autoencoder(given: Any) -> Any:
    """A name, by which it is known today."""
    from flowdcn_jax.config import RENAMED  # here, since it imports JAX

    return RENAMED["autoencoder.name"].get(given, given)


class _Options:
    """A value of another type, or out of range whatever the model, is a SamplingError."""

    def __post_init__(self):
        checked(self, error=SamplingError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(_Options):
    """Which images, how many and how many at a time."""

    classes: tuple[str, ...] | None = option(
        None,
        "which classes, such as 'golden retriever,207'",
        Range(any, lambda: "names and numbers of classes, or all"),
        parse=_parse_classes,
        unset="all classes in turn",
    )
    labels: str = option(
        "balanced",
        "order of the classes: in turn, or drawn evenly from the seed",
        one_of("balanced", "random"),
    )
    num_images: int | None = option(
        None,
        "images in all",
        at_least(1),
        unset=f"config.sampling.num_images, and {COMPARED_IMAGES} to compare",
    )
    batch_size: int = option(
        16,
        "images that a device draws at a time, if there are as many; few enough for several "
        "devices to share a small job",
        at_least(1),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Options):
    """What image i depends on, besides the weights, its class and i.

    `generator.fill_settings` puts values in the place of None, and checks what depends on several
    options or on the model. Of weights by name, those of their published figures come first.
    """

    image_size: tuple[int, int] | None = option(
        None,
        "height and width in pixels, multiples of the patch, such as 256x384",
        Range(lambda size: min(size) >= 1, lambda: "HxW or two positive whole numbers"),
        parse=_parse_size,
        unset="the size of training",
    )
    sampler: str | None = option(
        None, "the solver", name_in("flowdcn_jax.samplers:SAMPLERS"), unset="euler"
    )
    num_steps: int | None = option(
        None, "steps from noise to image", at_least(1), unset="config.sampling.num_steps"
    )
    last_step: float | None = option(
        None,
        "length of the last step",
        Range(lambda length: 0 < length <= 1, lambda: "a length in (0, 1]"),
        unset="as long as the others",
    )
    time_shift: float = option(
        1.0, "above 1, steps are shorter near the noise, for high resolutions", POSITIVE
    )
    diffusion: str | None = option(
        None,
        "beta(t) of the SDE samplers, 1 - t for sigma",
        name_in("flowdcn_jax.samplers:DIFFUSIONS"),
        unset="sigma",
    )
    guidance: float | None = option(
        None, "guidance weight, 1 for none", at_least(0), unset="config.sampling.guidance"
    )
    guidance_channels: str | None = option(
        None,
        "whether all channels are guided, or the first three alone",
        name_in("flowdcn_jax.flow.guidance:CHANNELS"),
        unset="all",
    )
    guidance_interval: tuple[float, float] | None = option(
        None,
        "times t with guidance; t=0 is noise, t=1 the image",
        Range(
            lambda times: 0 <= times[0] <= times[1] <= 1,
            lambda: "two times LOW,HIGH in order, in [0, 1]",
        ),
        parse=_parse_interval,
        unset="all t",
    )
    guidance_schedule: str = option(
        "constant",
        "guidance weight over t; linear and cosine rise from 1 at t=0 to guidance at t=1",
        name_in("flowdcn_jax.flow.guidance:SCHEDULES"),
    )
    resolution_adjustment: str | None = option(
        None,
        "how much further deformable blocks reach in larger images",
        name_in("flowdcn_jax.models.resolution:RESOLUTION_ADJUSTMENTS"),
        unset="none",
    )
    seed: int | None = option(
        None, "image i depends on it and on i alone", SEED, unset="config.sampling.seed"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelChoice(_Options):
    """Which weights of a run draw, guide and decode."""

    step: int | None = option(None, "checkpoint to use", at_least(0), unset="the newest")
    ema: str | None = option(
        None,
        "name of the EMA to draw with: one of config.ema.others, or one made after training",
        unset="ema",
    )
    guide_workdir: Path | None = option(
        None,
        "autoguidance: a run whose weaker model guides instead of no class",
        unset="the run itself, if there is a guide_step",
    )
    guide_step: int | None = option(
        None,
        "autoguidance: checkpoint of the guide",
        at_least(0),
        unset="the newest, if there is a guide_workdir",
    )
    autoencoder: str | None = option(
        None,
        "what decodes",
        name_in("flowdcn_jax.autoencoders:AUTOENCODERS"),
        parse=_parse_autoencoder,
        unset="config.autoencoder.name",
    )
    autoencoder_weights: Path | None = option(
        None,
        "its safetensors file, or the folder",
        unset="config.autoencoder.weights, if the run names this autoencoder",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output(_Options):
    """What is written where."""

    out: Path | None = option(
        None,
        "output folder",
        unset="one for these settings in WORKDIR/samples, of weights by name in samples/NAME",
    )
    save_images: bool = option(False, "write every image as a PNG of its own, too")
    compare: str | None = option(
        None,
        "draw one strip instead, across the values of an option",
        name_in("flowdcn_jax.sampling.pictures:COMPARISONS"),
        unset="no strip",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.compare is not None and self.save_images:
            raise SamplingError("save_images is True; expected False, for a strip is one picture")
