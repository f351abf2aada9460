"""What the images of a sampling run depend on, and the checks made before any work."""

import dataclasses
import numbers
import re
from collections.abc import Iterable

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

    None is a value that `for_model` fills in, from the run's config or with what is named here.

    Attributes:
        image_size: (height, width) in image pixels, or "HxW"; None: that of training.
        sampler: one of samplers.SAMPLERS; None: "euler".
        num_steps: steps of the time grid; None: config.sampling.num_steps.
        last_step: length of the last step; None: as long as the others.
        time_shift: above 1 it moves the times towards the noise.
        diffusion: of the SDE samplers; None: "sigma".
        guidance: weight w; 1: none; None: config.sampling.guidance.
        guidance_channels: "all" or "three".
        guidance_interval: (low, high) in t; None: everywhere.
        guidance_schedule: "constant", "linear" or "cosine".
        resolution_adjustment: "none", "paper" or "released"; None: "none".
        seed: of the noise, below 2**32; None: config.sampling.seed.

    Raises:
        SamplingError: a value of another type, or out of range whatever the model.
    """

    image_size: tuple[int, int] | str | None = None
    sampler: str | None = None
    num_steps: int | None = None
    last_step: float | None = None
    time_shift: float = 1.0
    diffusion: str | None = None
    guidance: float | None = None
    guidance_channels: str = "all"
    guidance_interval: tuple[float, float] | None = None
    guidance_schedule: str = "constant"
    resolution_adjustment: str | None = None
    seed: int | None = None

    def __post_init__(self):
        _check_choice("sampler", self.sampler, samplers.SAMPLERS)
        _check_choice("diffusion", self.diffusion, samplers.DIFFUSIONS)
        _check_choice("resolution_adjustment", self.resolution_adjustment, RESOLUTION_ADJUSTMENTS)
        for name in ("last_step", "time_shift"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, numbers.Real):
                raise SamplingError(f"{name} is {value!r}; expected a number")
        if self.seed is not None:
            check_integer("seed", self.seed, minimum=0)
            if self.seed >= 2**32:
                raise SamplingError(f"seed is {self.seed}; expected a number below 2**32")
        try:
            if self.num_steps is not None:
                self.evaluation_times()
            if self.sampler is not None:
                samplers.check_diffusion(self.sampler, self.diffusion)
            check_guidance(
                scale=1 if self.guidance is None else self.guidance,
                channels=self.guidance_channels,
                interval=self.guidance_interval,
                schedule=self.guidance_schedule,
            )
        except ValueError as error:
            raise SamplingError(str(error)) from error
        self._put_in_one_form()

    def for_model(self, config: ConfigDict) -> "Settings":
        """These settings with what is None filled in, once they are known to fit the model.

        Raises:
            SamplingError: a size that the model cannot make, an adjustment that it cannot use, or
                values that do not go together.
        """
        defaults = dict(
            image_size=(config.data.image_size,) * 2,
            sampler="euler",
            num_steps=config.sampling.num_steps,
            guidance=config.sampling.guidance,
            resolution_adjustment="none",
            seed=config.sampling.seed,
        )
        unset = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        settings = dataclasses.replace(self, **unset)
        height, width = settings.image_size
        stride = config.autoencoder.downsampling * config.model.patch_size
        if min(height, width) < 1 or height % stride or width % stride:
            raise SamplingError(
                f"image_size is {height}x{width}; expected HxW, both multiples of {stride} "
                f"(autoencoder.downsampling={config.autoencoder.downsampling} times "
                f"model.patch_size={config.model.patch_size})"
            )
        adjustment = settings.resolution_adjustment
        if adjustment != "none" and not takes_max_scale_factor(config.model):
            raise SamplingError(
                f"resolution_adjustment is {adjustment!r}; expected none, since the model "
                f"{config.model.name!r} has no deformable blocks"
            )
        return settings

    def evaluation_times(self):
        """The t of each evaluation of the velocity; see samplers.evaluation_times."""
        return samplers.evaluation_times(
            self.sampler or "euler",
            self.num_steps,
            last_step=self.last_step,
            time_shift=self.time_shift,
        )

    def num_evaluations(self) -> tuple[int, int]:
        """(velocities, passes of one image through a model): guidance takes two passes."""
        times = self.evaluation_times()
        options = dict(scale=self.guidance, interval=self.guidance_interval)
        return len(times), sum(1 + guided_at(t, **options) for t in times)

    def _put_in_one_form(self) -> None:
        """Plain ints, floats and tuples, so that equal settings are written to files alike."""
        forms = dict(
            image_size=parse_size,
            num_steps=int,
            last_step=float,
            time_shift=float,
            guidance=float,
            guidance_interval=lambda interval: tuple(map(float, interval)),
            seed=int,
        )
        for name, form in forms.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, form(value))


def check_integer(name: str, value: int, *, minimum: int) -> None:
    """Raises SamplingError unless `value` is a whole number of at least `minimum`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise SamplingError(f"{name} is {value!r}; expected a whole number")
    if value < minimum:
        raise SamplingError(f"{name} is {value}; expected at least {minimum}")


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise SamplingError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def parse_size(image_size: str | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of "HxW", or of two whole numbers.

    Raises:
        SamplingError: not of that form.
    """
    if isinstance(image_size, str):
        match = re.fullmatch(r"(\d+)x(\d+)", image_size)
        sides = map(int, match.groups()) if match else ()
    else:
        sides = image_size if isinstance(image_size, Iterable) else ()
    sides = tuple(sides)
    if len(sides) != 2 or not all(isinstance(side, numbers.Integral) for side in sides):
        raise SamplingError(
            f"image_size is {image_size!r}; expected HxW in pixels, as in 256x384, or two whole "
            "numbers"
        )
    return int(sides[0]), int(sides[1])


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
