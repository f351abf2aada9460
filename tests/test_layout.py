"""The packages' imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("flowdcn_jax", "pallas_kernels", "configs", "tests")

# A package, and what it may import beyond the standard library and itself.
ALLOWED = {
    "pallas_kernels": {"jax", "jaxlib", "numpy"},
    "configs": {"ml_collections"},
    "flowdcn_jax/flow": {"jax"},
    "flowdcn_jax/samplers": {"jax", "numpy"},
    "flowdcn_jax/models": {"jax", "numpy", "flax", "pallas_kernels", "flowdcn_jax.precision"},
    "flowdcn_jax/autoencoders": {
        "jax",
        "numpy",
        "flax",
        "safetensors",
        "flowdcn_jax.errors",
        "flowdcn_jax.precision",
    },
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_it_may(package):
    import sys

    own = package.replace("/", ".")
    for path in (ROOT / package).rglob("*.py"):
        for name in imports(path):
            allowed = ALLOWED[package] | sys.stdlib_module_names
            fine = name.startswith(own) or not allowed.isdisjoint({name, name.split(".")[0]})
            assert fine, f"{path.relative_to(ROOT)} imports {name}"


def test_the_library_does_not_import_its_users():
    for path in (ROOT / "flowdcn_jax").rglob("*.py"):
        bad = {name for name in imports(path) if name.split(".")[0] in ("configs", "tests")}
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_only_the_command_imports_the_training_loop():
    for path in (ROOT / "flowdcn_jax").rglob("*.py"):
        assert "flowdcn_jax.training.loop" not in imports(path), path.relative_to(ROOT)


def test_modules_stay_readable():
    for package in OURS:
        for path in (ROOT / package).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines; split it"
