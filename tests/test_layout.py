"""Imports form no circle, and what promises to stand alone does."""

import sys

import pytest

from tests import imports


def test_packages_import_one_another_in_no_circle():
    assert imports.circle(imports.graph()) is None


def test_modules_import_one_another_in_no_circle():
    assert imports.circle(imports.module_graph()) is None


def test_a_circle_is_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}}
    assert set(imports.circle(edges)) == {"b", "c"}


@pytest.mark.parametrize("package", ["pallas_kernels", "flowdcn_jax.flow", "flowdcn_jax.samplers"])
def test_the_package_imports_jax_and_nothing_else_of_the_project(package):
    assert imports.graph()[package] == set()
    for module, path in imports.modules().items():
        if imports.package_of(module) == package:
            outside = imports.top_level_names(path) - sys.stdlib_module_names
            allowed = {"jax", "jaxlib", "numpy", "ml_dtypes", *package.split(".")[:1]}
            assert outside <= allowed, f"{path} imports {outside}"


def test_the_picture_of_the_packages_is_todays():
    text = (imports.ROOT / "CONTRIBUTING.md").read_text()
    assert imports.with_picture(text) == text, "python -m tests.imports --write"


@pytest.mark.parametrize(
    "root", ["flowdcn_jax", "pallas_kernels", "configs", "tests", "benchmarks"]
)
def test_modules_stay_readable(root):
    for path in (imports.ROOT / root).rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 450, f"{path.relative_to(imports.ROOT)} has {lines} lines; split it"
