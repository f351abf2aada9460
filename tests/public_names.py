"""The project's public names and their docstrings, found in the files themselves.

Public is what a package exports (in __all__, or defined in its __init__), and what the modules of
MODULES define. The reference in docs/ must have each: docs/_build/public_names.py looks.
"""

import ast
import functools
from typing import NamedTuple

from tests import imports

MODULES = (
    "flowdcn_jax.config",
    "flowdcn_jax.errors",
    "flowdcn_jax.flow.guidance",
    "flowdcn_jax.flow.loss",
    "flowdcn_jax.flow.path",
    "flowdcn_jax.images",
)
_Definition = ast.FunctionDef | ast.ClassDef


class PublicName(NamedTuple):
    """Where a name is defined, as a dotted path, and what it says there."""

    path: str
    docstring: str | None  # of a constant the text below it


def public_names() -> dict[str, PublicName]:
    """The public names, dotted, as users import them."""
    files = imports.modules()
    packages = [name for name, path in files.items() if path.name == "__init__.py"]
    names = {}
    for module in (*packages, *MODULES):
        for name in sorted(_exported(module)):
            names[f"{module}.{name}"] = _find(module, name)
    return names


def _exported(module: str) -> set[str]:
    body = _body(module)
    assigned = _assigned(module)
    if "__all__" in assigned:
        value = assigned["__all__"]
        listed = ast.literal_eval(value if isinstance(value, ast.List) else assigned["_MODULES"])
        return set(listed)
    return {n.name for n in body if isinstance(n, _Definition) and not n.name.startswith("_")}


def _find(module: str, name: str) -> PublicName:
    path, body, assigned = f"{module}.{name}", _body(module), _assigned(module)
    if name in assigned:
        (place,) = (i for i, node in enumerate(body) if getattr(node, "value", 0) is assigned[name])
        below = body[place + 1] if place + 1 < len(body) else None
        text = below.value if isinstance(below, ast.Expr) else None
        return PublicName(path, text.value if isinstance(text, ast.Constant) else None)
    for node in body:
        if isinstance(node, _Definition) and node.name == name:
            return PublicName(path, ast.get_docstring(node))
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _find(node.module, name)
    if "_MODULES" in assigned:
        return _find(f"{module}.{ast.literal_eval(assigned['_MODULES'])[name]}", name)
    if module == "flowdcn_jax":  # what it exports is sampling's
        return _find("flowdcn_jax.sampling", name)
    raise AssertionError(f"{module} exports {name}, and it is not found")


@functools.cache
def _body(module: str) -> list[ast.stmt]:
    return ast.parse(imports.modules()[module].read_text()).body


@functools.cache
def _assigned(module: str) -> dict[str, ast.expr]:
    found = {}
    for node in _body(module):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and getattr(node, "value", None) is not None:
                found[target.id] = node.value
    return found
