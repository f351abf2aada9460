"""What the images of a sampling run depend on, and the checks made before any work."""

import dataclasses
import math
import re

from ml_collections import ConfigDict

from flowdcn_jax import samplers
from flowdcn_jax.errors import UserError
from flowdcn_jax.flow.guidance import check_guidance, guided_at
from flowdcn_jax.models import takes_max_scale_factor
from flowdcn_jax.models.resolution import RESOLUTION_ADJUSTMENTS


class SamplingError(UserError, ValueError):
    """A request that the model cannot serve; the message names the value and the choices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What image i depends on, besides the weights, its class and i. sample.py's flags, by name.

    Attributes:
        image_size: (height, width) in image pixels; None: that of training.
        sampler: one of samplers.SAMPLERS.
        num_steps: steps of the time grid.
        last_step: length of the last step; None: as long as the others.
        time_shift: above 1 it moves the times towards the noise.
        diffusion: of the SDE samplers; None: "sigma".
        guidance: weight w; 1: none.
        guidance_channels: "all" or "three".
        guidance_interval: (low, high) in t; None: everywhere.
        guidance_schedule: "constant", "linear" or "cosine".
        resolution_adjustment: "none", "paper" or "released".
        seed: of the noise.

    Raises:
        SamplingError: a value that is out of range, whatever the model.
    """

    image_size: tuple[int, int] | None = None
    sampler: str = "euler"
    num_steps: int = 50
    last_step: float | None = None
    time_shift: float = 1.0
    diffusion: str | None = None
    guidance: float = 1.375
    guidance_channels: str = "all"
    guidance_interval: tuple[float, float] | None = None
    guidance_schedule: str = "constant"
    resolution_adjustment: str = "none"
    seed: int = 0

    def __post_init__(self):
        check_number("seed", self.seed, minimum=0)
        if self.seed >= 2**32:
            raise SamplingError(f"seed is {self.seed}; expected a number below 2**32")
        try:
            self.evaluation_times()
            samplers.check_diffusion(self.sampler, self.diffusion)
            check_guidance(
                scale=self.guidance,
                channels=self.guidance_channels,
                interval=self.guidance_interval,
                schedule=self.guidance_schedule,
            )
        except ValueError as error:
            raise SamplingError(str(error)) from error
        if self.resolution_adjustment not in RESOLUTION_ADJUSTMENTS:
            raise SamplingError(
                f"resolution_adjustment is {self.resolution_adjustment!r}; expected one of "
                f"{', '.join(RESOLUTION_ADJUSTMENTS)}"
            )

    def for_model(self, config: ConfigDict) -> "Settings":
        """These settings with the image size filled in, once they are known to fit the model.

        Raises:
            SamplingError: a size that the model cannot make, or an adjustment that it cannot use.
        """
        side = config.data.image_size
        height, width = self.image_size or (side, side)
        stride = config.autoencoder.downsampling * config.model.patch_size
        if min(height, width) < 1 or height % stride or width % stride:
            raise SamplingError(
                f"image_size is {height}x{width}; expected HxW, both multiples of {stride} "
                f"(autoencoder.downsampling={config.autoencoder.downsampling} times "
                f"model.patch_size={config.model.patch_size})"
            )
        if self.resolution_adjustment != "none" and not takes_max_scale_factor(config.model):
            raise SamplingError(
                f"resolution_adjustment is {self.resolution_adjustment!r}; expected none, since "
                f"the model {config.model.name!r} has no deformable blocks"
            )
        return dataclasses.replace(self, image_size=(height, width))

    def evaluation_times(self):
        """The t of each evaluation of the velocity; see samplers.evaluation_times."""
        return samplers.evaluation_times(
            self.sampler, self.num_steps, last_step=self.last_step, time_shift=self.time_shift
        )

    def num_evaluations(self) -> tuple[int, int]:
        """(velocities, passes of one image through a model): guidance takes two passes."""
        times = self.evaluation_times()
        options = dict(scale=self.guidance, interval=self.guidance_interval)
        return len(times), sum(1 + guided_at(t, **options) for t in times)


def check_number(name: str, value: float, *, minimum: float) -> None:
    """Raises SamplingError for a number below `minimum`, infinite or NaN."""
    if not (value >= minimum and math.isfinite(value)):
        raise SamplingError(f"{name} is {value}; expected at least {minimum}")


def parse_size(image_size: str | None) -> tuple[int, int] | None:
    """(height, width) in pixels of "HxW"; None for None.

    Raises:
        SamplingError: not of that form.
    """
    if image_size is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", image_size)
    if not match:
        raise SamplingError(f"image_size is {image_size!r}; expected HxW in pixels, as in 256x384")
    return int(match[1]), int(match[2])


def parse_interval(texts: list[str] | None) -> tuple[float, float] | None:
    """(low, high) of two texts that are numbers; None for None.

    Raises:
        SamplingError: not two numbers. Settings checks their range.
    """
    if texts is None:
        return None
    try:
        low, high = map(float, texts)
    except ValueError as error:
        raise SamplingError(
            f"guidance_interval is {','.join(texts)!r}; expected two times, as in 0.2,0.8"
        ) from error
    return low, high
