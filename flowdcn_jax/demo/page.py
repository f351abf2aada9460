"""What the page asks and answers, whatever shows it.

A field is an option of `flowdcn_jax.sampling`, with the model's own value in it at first.
"""

import dataclasses
import shlex
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flowdcn_jax import faults, samplers
from flowdcn_jax.images import grid_columns, make_grid
from flowdcn_jax.options import Option, options_of
from flowdcn_jax.sampling.classes import class_labels
from flowdcn_jax.sampling.generator import count_evaluations
from flowdcn_jax.sampling.pictures import COMPARISONS
from flowdcn_jax.sampling.settings import COMPARED_IMAGES, Request, SamplingError, Settings
from flowdcn_jax.sampling.trained_model import TrainedModel

MAX_IMAGES = 16  # at a time, for somebody waits
FIRST_IMAGES = 8  # unless the run's grid has fewer
MAX_STEPS = 1000
STRIP_ROWS = COMPARED_IMAGES
STRIP_COLUMNS = 8

# What is seen at once, in this order; the rest of the options come below.
FIRST = ("classes", "image_size", "sampler", "num_steps", "guidance", "seed", "num_images")


class Field(NamedTuple):
    """A place on the page for the value of an option.

    Attributes:
        option: the option; its `type` says what is entered.
        value: what stands there at first; None: nothing, which is the option's default.
        choices: values to choose from; None: none are offered.
        closed: whether the choices are all there are.
        several: whether several of them may be chosen.
    """

    option: Option
    value: Any
    choices: list[str] | None
    closed: bool = True
    several: bool = False

    @property
    def help(self) -> str:
        """What it is, and what may stand there where that cannot be seen."""
        parts = [self.option.help]
        if self.choices is None and self.option.type is not bool:
            parts.append(self.option.values)
        if self.option.unset is not None and self.value in (None, ""):
            parts.append(f"by default {self.option.unset}")
        return "; ".join(parts)


class Answer(NamedTuple):
    """What the page shows for some values.

    Attributes:
        text: what was drawn, or one line that says what is wrong.
        command: the command that draws the same images; "" if nothing was drawn.
        grid: the images with their classes, uint8 [H,W,3]; None: nothing was drawn.
        strip: the first of them from noise to image, a row an image, uint8 [H,W,3], or None.
    """

    text: str
    command: str = ""
    grid: np.ndarray | None = None
    strip: np.ndarray | None = None


class Page:
    """The page of one model.

    Args:
        model: draws.
        flags: those that name it to the commands, such as "--workdir=runs/digits".
    """

    def __init__(self, model: TrainedModel, flags: list[str]):
        self._model = model
        self._flags = flags
        declared = options_of(Request) | options_of(Settings)
        del declared["batch_size"]  # of large jobs
        self._options = {name: declared.pop(name) for name in FIRST} | declared
        self._own = vars(Request()) | vars(model.fill_settings(Settings()))
        count = self._own["num_images"] or model.config.sampling.num_images
        self._own["num_images"] = min(count, FIRST_IMAGES)

    @property
    def title(self) -> str:
        """What the model is, in a line."""
        config = self._model.config
        side = config.data.image_size
        return f"{config.model.name}, {config.model.num_classes} classes, trained at {side}x{side}"

    def fields(self) -> list[Field]:
        """The page's fields, those of FIRST first."""
        return [self._field(option) for option in self._options.values()]

    def _field(self, option: Option) -> Field:
        value = self._own[option.name]
        if option.name == "classes":
            classes = range(self._model.config.model.num_classes)
            names = class_labels(classes, self._model.words)
            return Field(option, value, names, closed=False, several=True)
        if option.name == "image_size":
            sizes, _ = COMPARISONS["image_size"].columns(Settings(), self._model.config)
            return Field(option, _flag_text(option.name, value), list(sizes), closed=False)
        if option.choices is not None and value is None:
            return Field(option, "", ["", *option.choices])
        return Field(option, value, option.choices)

    def answer(self, values: Mapping[str, Any]) -> Answer:
        """Draws, or says in one line what is wrong.

        Args:
            values: of the fields, by name; None, "" and () stand for an option's default.
        """
        given = {name: value for name, value in values.items() if value not in (None, "", [], ())}
        try:
            return self._drawn(given)
        except Exception as error:
            if faults.status_of(error) is None:
                raise
            return Answer(f"error: {faults.as_line(error)}")

    def _drawn(self, given: dict[str, Any]) -> Answer:
        request = Request(**{name: given[name] for name in options_of(Request) if name in given})
        settings = Settings(**{name: given[name] for name in options_of(Settings) if name in given})
        if request.num_images is None:
            request = dataclasses.replace(request, num_images=self._own["num_images"])
        settings = self._model.fill_settings(settings)
        for name, value, most in (
            ("num_images", request.num_images, MAX_IMAGES),
            ("num_steps", settings.num_steps, MAX_STEPS),
        ):
            if value > most:
                raise SamplingError(f"{name} is {value}; expected at most {most} on this page")
        labels = self._model.labels(request, seed=settings.seed)
        keep = kept_steps(settings.num_steps)
        start_s = time.perf_counter()
        drawn = self._model.draw(
            settings, labels, batch_size=request.batch_size, progress=False, keep=keep
        )
        seconds = time.perf_counter() - start_s
        names = class_labels(labels, self._model.words)
        velocities, passes = count_evaluations(settings)
        return Answer(
            f"{len(labels)} images in {seconds:.1f} s; each took {velocities} evaluations of the "
            f"velocity, {passes} passes through a model",
            self._command(request, settings),
            _grid(drawn[:, -1], labels, names),
            _strip(drawn, _times(settings, keep), names),
        )

    def _command(self, request: Request, settings: Settings) -> str:
        """sample.py with the flags that differ from what it would do without."""
        values = vars(request) | vars(settings)
        own = vars(Request()) | vars(self._model.fill_settings(Settings()))
        given = {name: values[name] for name in self._options if values[name] != own[name]}
        of_settings = {name: value for name, value in given.items() if hasattr(settings, name)}
        if self._model.fill_settings(Settings(**of_settings)) != settings:
            # What a name's published settings fill in depends on what else is given: give it all.
            given = {name: values[name] for name in self._options if values[name] is not None}
        flags = [f"--{name}={_flag_text(name, value)}" for name, value in given.items()]
        return shlex.join(["python", "sample.py", *self._flags, *flags])


def kept_steps(num_steps: int) -> tuple[int, ...]:
    """The numbers of the steps that a strip shows: evenly from 0, the noise, to the image."""
    columns = min(STRIP_COLUMNS, num_steps + 1)
    return tuple(round(step) for step in np.linspace(0, num_steps, columns))


def _times(settings: Settings, keep: tuple[int, ...]) -> np.ndarray:
    """t of each step kept."""
    grid = samplers.time_grid(
        settings.sampler,
        settings.num_steps,
        last_step=settings.last_step,
        time_shift=settings.time_shift,
    )
    return grid[list(keep)]


def _grid(images: np.ndarray, labels: np.ndarray, names: list[str]) -> np.ndarray:
    columns = grid_columns(len(images), len(np.unique(labels)))
    return make_grid(images, columns=columns, captions=names)


def _strip(drawn: np.ndarray, times: np.ndarray, names: list[str]) -> np.ndarray:
    rows = drawn[:STRIP_ROWS]
    captions = [f"{name}, t={t:.2f}" for name in names[: len(rows)] for t in times]
    return make_grid([x for row in rows for x in row], columns=len(times), captions=captions)


def _flag_text(name: str, value: Any) -> str:
    """A value as the flag takes it."""
    if name == "image_size":
        return "{}x{}".format(*value)
    if name == "classes":
        return ",".join(f'"{text}"' if "," in text else text for text in value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
