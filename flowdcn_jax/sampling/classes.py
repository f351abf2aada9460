"""Which class each image is of: names, numbers, and their order."""

import difflib
import functools
import importlib.resources
import re
from collections.abc import Sequence

import numpy as np

from flowdcn_jax.sampling.settings import SamplingError

IMAGENET_FILE = (
    "imagenet_classes.txt"  # a class a line: its name, then WordNet's other words for it
)
MAX_SUGGESTIONS = 5


@functools.cache
def imagenet_words() -> tuple[tuple[str, ...], ...]:
    """What ImageNet-1k's 1000 classes are called, in their usual order; the first word is the name.

    Names are unique: three that ImageNet uses twice have an explanation in parentheses.
    """
    folder = importlib.resources.files("flowdcn_jax.sampling")
    lines = (folder / IMAGENET_FILE).read_text(encoding="utf-8").splitlines()
    return tuple(tuple(line.split(", ")) for line in lines)


def class_words(
    num_classes: int, names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], ...] | None:
    """Every class's name and other words for it; None where they are not known.

    Args:
        num_classes: of the model. 1000 without names, or with names that begin with WordNet's
            numbers ("n01440764", "n01440764_tench"), is ImageNet.
        names: those saved with the training run, or None.
    """
    if num_classes == 1000 and all(re.fullmatch(r"n\d{8}(_.*)?", name) for name in names or ()):
        return imagenet_words()
    if names and not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return tuple((name,) for name in names)
    return None


def parse_classes(
    classes: Sequence[str],
    num_classes: int,
    words: tuple[tuple[str, ...], ...] | None,
) -> list[int]:
    """Class numbers from numbers and names; "all" is every class.

    A class's name comes before another class's other words; upper case does not matter, and an
    underscore is a space. A number that is also a name is the name.

    Args:
        classes: `Request.classes`.
        num_classes: of the model.
        words: see `class_words`.

    Raises:
        SamplingError: a number out of range, or a name that is unknown or stands for several
            classes; the message gives the nearest names.
    """
    if list(classes) == ["all"]:
        return list(range(num_classes))
    names, others = {}, {}
    for number, (name, *rest) in enumerate(words or ()):
        names[_folded(name)] = number
        for word in rest:
            others.setdefault(_folded(word), []).append(number)
    numbers = []
    for text in classes:
        word = _folded(text)
        if word in names:
            numbers.append(names[word])
        elif word.isdecimal() and int(word) < num_classes:
            numbers.append(int(word))
        elif len(others.get(word, ())) == 1:
            numbers.append(others[word][0])
        else:
            raise SamplingError(_unknown_class(text, word, num_classes, words, others))
    return numbers


def _folded(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def _unknown_class(text, word, num_classes, words, others) -> str:
    message = f"classes names {text!r}; expected numbers from 0 to {num_classes - 1}"
    if not words:
        return message
    if word in others:
        several = ", ".join(f"{words[number][0]} ({number})" for number in others[word])
        return f"{message}, or one name: {text!r} stands for {several}"
    if num_classes <= 20:
        return f"{message}, or names ({', '.join(name for name, *_ in words)})"
    known = {_folded(known): known for row in words for known in row}
    near = [known[k] for k in known if word in k and word]
    near += [known[k] for k in difflib.get_close_matches(word, known, n=MAX_SUGGESTIONS)]
    near = list(dict.fromkeys(near))[:MAX_SUGGESTIONS]
    nearest = f"; the nearest are {', '.join(near)}" if near else ""
    return f"{message}, or names of classes{nearest}"


def class_labels(labels: np.ndarray, words: tuple[tuple[str, ...], ...] | None) -> list[str]:
    """What to write under images of classes `labels` [n]: names, or numbers without names."""
    return [words[label][0] if words else str(label) for label in labels]


def labels_in_turn(classes: tuple[int, ...], num_images: int, num_classes: int) -> np.ndarray:
    """Labels [num_images]: image i is of class i modulo the classes asked for (all if none)."""
    chosen = np.asarray(classes if len(classes) else range(num_classes), np.int32)
    return chosen[np.arange(num_images) % len(chosen)]


def make_labels(
    order: str, classes: tuple[int, ...], num_images: int, num_classes: int, *, seed: int
) -> np.ndarray:
    """Labels [num_images], int32, of the classes asked for (all if none).

    Args:
        order: "balanced": the classes in turn. "random": drawn evenly, from the seed.
        classes: class numbers; () for all.
        num_images: how many.
        num_classes: of the model.
        seed: of the random order.
    """
    if order == "balanced":
        return labels_in_turn(classes, num_images, num_classes)
    chosen = labels_in_turn(classes, len(classes) or num_classes, num_classes)
    return np.random.default_rng(seed).choice(chosen, num_images)
