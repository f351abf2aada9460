"""Options declared once: their values, and the functions that take them."""

import dataclasses
import inspect
import math
from pathlib import Path

import numpy as np
import pytest

from flowdcn_jax.errors import ConfigError, UserError
from flowdcn_jax.options import (
    FRACTION,
    POSITIVE,
    SEED,
    at_least,
    checked,
    name_in,
    one_of,
    option,
    options_of,
    takes_options,
)

COLOURS = ("red", "blue")
SHAPES = {"square": 4, "circle": 0}


def parse_pair(given):
    first, second = given.split(",") if isinstance(given, str) else given
    return int(first), int(second)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paint:
    """How to paint."""

    colour: str = option("red", "the colour", name_in("tests.test_options:COLOURS"))
    shape: str | None = option(None, "the shape", name_in("tests.test_options:SHAPES"))
    layers: int = option(2, "coats, one on the other", at_least(1), fixed=True)
    opacity: float | None = option(None, "of a coat", FRACTION, unset="what the colour has")
    edges: tuple[int, int] | None = option(None, "left and right", parse=parse_pair)
    brush: Path | None = option(None, "its file")
    dry: bool = option(False, "whether to wait for each coat")
    note: str = option("", "written below")
    not_an_option: int = 3

    def __post_init__(self):
        checked(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """What it costs."""

    price: float = option(1.0, "of a coat, in euros", POSITIVE)

    def __post_init__(self):
        checked(self, prefix="bill.", error=ConfigError)


def test_values_become_plain_python():
    paint = Paint(layers=np.int64(3), opacity=np.float32(0.5), edges="1,2", brush="a/b")
    assert (paint.layers, paint.opacity, paint.edges, paint.brush) == (3, 0.5, (1, 2), Path("a/b"))
    assert [type(value) for value in (paint.layers, paint.opacity)] == [int, float]
    assert paint == Paint(layers=3, opacity=0.5, edges=[1, 2], brush=Path("a/b"))
    assert type(Price(price=2).price) is float
    assert Paint() == Paint(shape=None, opacity=None, edges=None)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(layers=0), "layers is 0; expected at least 1$"),
        (dict(layers=2.5), "layers is 2.5; expected a whole number: at least 1$"),
        (dict(layers=True), "layers is True; expected a whole number"),
        (dict(layers=None), "layers is None; expected a whole number"),
        (dict(opacity=1), r"opacity is 1; expected a number in \[0, 1\) or None$"),
        (dict(opacity=math.nan), "opacity is nan; expected a number"),
        (dict(opacity="0.5"), "opacity is '0.5'; expected a number"),
        (dict(colour="green"), "colour is 'green'; expected one of red, blue$"),
        (dict(colour=1), "colour is 1; expected one of red, blue$"),
        (dict(shape="line"), "shape is 'line'; expected one of circle, square or None$"),
        (dict(edges="1"), "edges is '1'; expected not enough values"),
        (dict(edges=1), "edges is 1; expected "),
        (dict(brush=3), "brush is 3; expected a path or None$"),
        (dict(dry=1), "dry is 1; expected True or False$"),
    ],
)
def test_other_values_are_refused(given, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Paint(**given)


def test_a_message_has_the_name_and_the_type_that_the_class_gives():
    with pytest.raises(ConfigError, match="^bill.price is -1.0; expected a positive number$"):
        Price(price=-1.0)


def test_ranges():
    assert SEED.text() == "at least 0 and below 2**32"
    for values, refused, given in (
        (at_least(0), -1, 0),
        (POSITIVE, 0, 0.1),
        (FRACTION, 1.0, 0.0),
        (SEED, 2**32, 2**32 - 1),
        (one_of("a", "b"), "c", "b"),
        (name_in("tests.test_options:SHAPES"), "red", "circle"),
    ):
        assert values.holds(given) and not values.holds(refused)


def test_a_ranges_text_says_what_a_text_must_be():
    pairs = at_least(1)._replace(holds=lambda pair: pair[0] < pair[1], text=lambda: "A,B in order")
    cls = dataclasses.make_dataclass(
        "Pairs", [("pair", tuple, option((0, 1), "a pair", pairs, parse=parse_pair))]
    )
    declared = options_of(cls)["pair"]
    assert declared.value("1,2") == (1, 2)
    for bad in ("1", "a,b", "2,1", 7):
        with pytest.raises(UserError, match="expected A,B in order$"):
            declared.value(bad)


def test_what_is_declared():
    declared = options_of(Paint)
    assert list(declared) == [
        *("colour", "shape", "layers", "opacity", "edges", "brush", "dry", "note")
    ]
    assert declared["layers"].fixed and not declared["colour"].fixed
    assert declared["edges"].type is tuple and declared["edges"].optional
    assert declared["brush"].values == "a path" and declared["dry"].values == "True or False"
    assert declared["colour"].description == "the colour; one of red, blue"
    assert declared["opacity"].description == (
        "of a coat; a number in [0, 1); by default what the colour has"
    )
    assert declared["note"].description == "written below"


@takes_options
def paint(wall, how: Paint, price: Price, *, twice=False):
    """Paints.

    Args:
        wall: what to paint.
        OPTIONS

    Raises:
        UserError: no paint.
    """
    return wall, how, price, twice


def test_a_function_takes_options_as_keywords():
    assert paint("north", layers=3, price=2, twice=True) == (
        "north",
        Paint(layers=3),
        Price(price=2.0),
        True,
    )
    assert paint(wall="north") == ("north", Paint(), Price(), False)
    with pytest.raises(UserError, match="layers is 0"):
        paint("north", layers=0)
    with pytest.raises(TypeError, match=r"paint\(\) got an unexpected keyword argument 'layer'"):
        paint("north", layer=1)
    with pytest.raises(TypeError):
        paint("north", Paint())


def test_signature_and_docstring_name_every_option():
    parameters = inspect.signature(paint).parameters
    assert list(parameters) == ["wall", "twice", *options_of(Paint), "price"]
    assert parameters["layers"].default == 2
    assert parameters["layers"].annotation is int
    assert parameters["opacity"].annotation == float | None
    lines = inspect.getdoc(paint).splitlines()
    assert lines[:4] == ["Paints.", "", "Args:", "    wall: what to paint."]
    assert "    layers: coats, one on the other; at least 1." in lines
    assert lines[-2:] == ["Raises:", "    UserError: no paint."]
