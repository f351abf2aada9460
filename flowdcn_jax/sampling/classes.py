"""Which class each image is of."""

import numpy as np

from flowdcn_jax.sampling.settings import SamplingError


def labels_in_turn(classes: tuple[int, ...], num_images: int, num_classes: int) -> np.ndarray:
    """Labels [num_images]: image i is of class i modulo the classes asked for (all if none)."""
    chosen = np.asarray(classes if len(classes) else range(num_classes), np.int32)
    return chosen[np.arange(num_images) % len(chosen)]


def parse_classes(classes: list[str], num_classes: int, names: tuple[str, ...] | None) -> list[int]:
    """Class numbers from numbers or names.

    Raises:
        SamplingError: a number out of range or an unknown name; the message gives the choices.
    """
    choices = f"numbers from 0 to {num_classes - 1}"
    if names:
        close = "" if len(names) > 20 else f" ({', '.join(names)})"
        choices += f", or names of classes{close}"
    numbers = []
    for text in classes:
        text = text.strip()
        if names and text in names:
            numbers.append(names.index(text))
        elif text.isdecimal() and int(text) < num_classes:
            numbers.append(int(text))
        else:
            raise SamplingError(f"--classes names {text!r}; expected {choices}")
    return numbers
