"""Griffe extension: what the reference cannot read in the files, as running code has it.

Options are declared once, in dataclasses: the functions that take them get their signatures and
docstrings when they are decorated, and the dataclasses' fields their texts here. Some packages
import their names when these are asked for: the reference follows `_MODULES`, as they do.
"""

import importlib
import inspect
import re

import griffe

from flowdcn_jax.options import options_of


class Declared(griffe.Extension):
    """Fills in what `flowdcn_jax.options` and lazy packages say."""

    def on_function_instance(self, *, func: griffe.Function, **_) -> None:
        if not any("takes_options" in str(decorator.value) for decorator in func.decorators):
            return
        function = getattr(importlib.import_module(func.module.path), func.name)
        func.docstring = griffe.Docstring(
            inspect.getdoc(function), parent=func, lineno=func.lineno
        )
        func.parameters = griffe.Parameters(*map(_parameter, _signature(function)))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        if attr.docstring is None or not attr.parent.is_module:
            return
        value = getattr(importlib.import_module(attr.parent.path), attr.name)
        if isinstance(value, dict):
            attr.value = f"{{{', '.join(f'{name!r}: ...' for name in value)}}}"
        elif isinstance(value, (int, tuple)):
            attr.value = repr(value)

    def on_class_members(self, *, cls: griffe.Class, **_) -> None:
        if not any("option(" in str(a.value) for a in cls.attributes.values()):
            return
        declared = options_of(getattr(importlib.import_module(cls.module.path), cls.name))
        for name, option in declared.items():
            if name in cls.members:
                text = f"{option.description[0].upper()}{option.description[1:]}."
                cls[name].docstring = griffe.Docstring(text, parent=cls[name])
                cls[name].value = repr(option.default)

    def on_module_members(self, *, mod: griffe.Module, **_) -> None:
        if "__getattr__" not in mod.members or mod.exports is None:
            return
        package = "flowdcn_jax.sampling" if mod.path == "flowdcn_jax" else mod.path
        modules = importlib.import_module(package)._MODULES
        mod.exports = importlib.import_module(mod.path).__all__
        for name in mod.exports:
            mod.set_member(name, griffe.Alias(name, f"{package}.{modules[name]}.{name}", parent=mod))


def _signature(function):
    return inspect.signature(function).parameters.values()


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    empty = inspect.Parameter.empty
    kind = griffe.ParameterKind(parameter.kind.description)
    annotation = re.sub(r"\w+\.", "", inspect.formatannotation(parameter.annotation))
    return griffe.Parameter(
        parameter.name,
        kind=kind,
        annotation=None if parameter.annotation is empty else annotation,
        default=None if parameter.default is empty else repr(parameter.default),
    )
