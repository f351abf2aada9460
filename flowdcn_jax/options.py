"""Options, each declared once: a type, a default, a range and a text.

An option is a field of a dataclass whose default `option` makes. The config's checks, the commands'
flags, the keywords of functions and the tables in docs/ follow from it. Imports no JAX.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import numbers
import os
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowdcn_jax.errors import UserError
from flowdcn_jax.files import local_path

_TYPE_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a tuple",
    Path: "a path",
}


class Range(NamedTuple):
    """The values that an option takes, of those of its type."""

    holds: Callable[[Any], bool]
    text: Callable[[], str]  # ends "NAME is VALUE; expected ..."
    choices: Callable[[], Sequence[str]] | None = None  # the words, where it is some words


def at_least(minimum: float) -> Range:
    """Numbers from `minimum`."""
    return Range(lambda value: value >= minimum, lambda: f"at least {minimum}")


def one_of(*choices: str) -> Range:
    """One of some words."""
    text = f"one of {', '.join(choices)}"
    return Range(lambda value: value in choices, lambda: text, lambda: choices)


def name_in(registry: str) -> Range:
    """A key of the registry "MODULE:NAME", which is imported when it is needed.

    A tuple of names is listed in its order, the keys of a dict in the alphabet's.
    """

    def names() -> list[str]:
        module, _, name = registry.partition(":")
        found = getattr(importlib.import_module(module), name)
        return list(found) if isinstance(found, tuple) else sorted(found)

    return Range(lambda value: value in names(), lambda: f"one of {', '.join(names())}", names)


POSITIVE = Range(lambda value: value > 0, lambda: "a positive number")
FRACTION = Range(lambda value: 0 <= value < 1, lambda: "a number in [0, 1)")
# JAX keeps 32 bits of a seed without its 64-bit mode.
SEED = Range(lambda value: 0 <= value < 2**32, lambda: "at least 0 and below 2**32")


@dataclasses.dataclass(frozen=True)
class Option:
    """What is declared of an option.

    Attributes:
        name: of the field.
        type: of values other than None: bool, int, float, str, tuple or Path.
        optional: whether None is a value.
        default: its value where nothing else is said.
        help: what it is, with its unit; ends without a full stop.
        range: the values of the type that it takes; None: all of them.
        parse: from what people write (texts, lists) to a value; None: the type alone.
        unset: what None stands for.
        fixed: whether a run keeps its value for good.
    """

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    range: Range | None
    parse: Callable[[Any], Any] | None
    unset: str | None
    fixed: bool

    @property
    def values(self) -> str:
        """The values other than None, in words."""
        return self.range.text() if self.range else _TYPE_NAMES[self.type]

    @property
    def expected(self) -> str:
        """The values, in words."""
        return f"{self.values} or None" if self.optional else self.values

    @property
    def choices(self) -> list[str] | None:
        """The values other than None, where they are some words."""
        return list(self.range.choices()) if self.range and self.range.choices else None

    @property
    def description(self) -> str:
        """What it is, its range, and what None stands for; the default says itself."""
        parts = [self.help]
        if self.range is not None:
            parts.append(self.values)
        if self.unset is not None:
            parts.append(f"by default {self.unset}")
        return "; ".join(parts)

    def value(self, given: Any, *, name: str | None = None, error: type = UserError) -> Any:
        """`given` as a value of the option, in plain Python types.

        Args:
            given: what was written.
            name: what a message calls the option, if not by its name.
            error: type of the exception.

        Raises:
            UserError, or `error`: another type, or out of range.
        """
        if given is None and self.optional:
            return None
        name = name or self.name
        value = given
        if self.parse is not None and given is not None:
            try:
                value = self.parse(given)
            except (TypeError, ValueError) as e:
                expected = self.expected if self.range else e
                raise error(f"{name} is {given!r}; expected {expected}") from e
        elif not self._is_of_type(value):
            raise error(f"{name} is {given!r}; expected {self._type_text()}")
        if self.type is Path:
            value = local_path(value)
        elif self.type in (int, float):
            value = self.type(value)
        if self.range is not None and not self.range.holds(value):
            raise error(f"{name} is {given!r}; expected {self.expected}")
        return value

    def _is_of_type(self, value: Any) -> bool:
        if self.type in (int, float):
            kind = numbers.Integral if self.type is int else numbers.Real
            return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        return isinstance(value, (str, os.PathLike) if self.type is Path else self.type)

    def _type_text(self) -> str:
        """As `expected`; for a word of another type, the words that would do."""
        if self.range is not None and self.type in (str, bool):
            return self.expected
        text = _TYPE_NAMES[self.type]
        if self.range is not None:
            text = f"{text}: {self.range.text()}" if self.type is int else self.range.text()
        return f"{text} or None" if self.optional else text


def option(
    default: Any,
    help: str,
    range: Range | None = None,
    *,
    parse: Callable[[Any], Any] | None = None,
    unset: str | None = None,
    fixed: bool = False,
) -> Any:
    """A dataclass's field that is an option; the field's annotation gives its type.

    Args:
        default: the value where nothing else is said.
        help: what it is, with its unit.
        range: see `Option`.
        parse: see `Option`; raises TypeError or ValueError, with what was expected unless the
            range says it.
        unset: see `Option`.
        fixed: see `Option`.
    """
    declared = dict(help=help, range=range, parse=parse, unset=unset, fixed=fixed)
    return dataclasses.field(default=default, metadata={"option": declared})


@functools.cache
def options_of(cls: type) -> dict[str, Option]:
    """The options among a dataclass's fields, by name, in their order."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: _make_option(field, hints[field.name])
        for field in dataclasses.fields(cls)
        if "option" in field.metadata
    }


def checked(instance: Any, *, prefix: str = "", error: type = UserError) -> None:
    """Brings the options of a dataclass instance, also a frozen one, into plain Python types.

    For `__post_init__`.

    Args:
        instance: it is changed in place.
        prefix: what a message puts before a name.
        error: type of the exception.

    Raises:
        UserError, or `error`: the first value of another type, or out of range.
    """
    for name, declared in options_of(type(instance)).items():
        value = declared.value(getattr(instance, name), name=prefix + name, error=error)
        object.__setattr__(instance, name, value)


def instance_of(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of options, of those among `values` that are its own."""
    return cls(**{name: values[name] for name in options_of(cls)})


def takes_options(function: Callable) -> Callable:
    """Decorates a function with parameters that are dataclasses of options.

    Callers give the options as keywords; the function gets the instances made of them. Signature
    and docstring, in the place of the line OPTIONS, name each option, and any other keyword is a
    TypeError.
    """
    signature = inspect.signature(function)
    groups = {
        name: hint
        for name, hint in typing.get_type_hints(function).items()
        if name in signature.parameters and dataclasses.is_dataclass(hint) and options_of(hint)
    }
    declared = {name: o for cls in groups.values() for name, o in options_of(cls).items()}

    @functools.wraps(function)
    def with_keywords(*args, **given):
        instances = {
            parameter: cls(**{name: given.pop(name) for name in options_of(cls) if name in given})
            for parameter, cls in groups.items()
        }
        return function(*args, **given, **instances)

    own = [parameter for name, parameter in signature.parameters.items() if name not in groups]
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=each.type | None if each.optional else each.type,
        )
        for name, each in declared.items()
    ]
    with_keywords.__signature__ = signature.replace(parameters=[*own, *keywords])
    indents = dict(initial_indent=" " * 8, subsequent_indent=" " * 12)
    lines = [
        textwrap.fill(f"{name}: {each.description}.", 100, **indents)
        for name, each in declared.items()
    ]
    text = function.__doc__ or ""  # Python's -OO leaves none
    with_keywords.__doc__ = text.replace(" " * 8 + "OPTIONS", "\n".join(lines))
    return with_keywords


def _make_option(field: dataclasses.Field, hint: Any) -> Option:
    of = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    (kind,) = (part for part in of if part is not types.NoneType)
    return Option(
        name=field.name,
        type=typing.get_origin(kind) or kind,
        optional=types.NoneType in of,
        default=field.default,
        **field.metadata["option"],
    )
