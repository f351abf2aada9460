"""What is public has a docstring and a place in the reference."""

import re
import zlib

import pytest

from tests import tiny
from tests.public_names import MODULES, public_names

REFERENCE = tiny.REPOSITORY / "docs" / "reference"


def test_every_public_name_says_what_it_is():
    names = public_names()
    assert len(names) > 100
    assert [name for name, found in names.items() if not found.docstring] == []


def test_every_package_with_public_names_is_in_the_reference():
    """`make docs` looks for each name in what was built."""
    pages = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    assert {name.rpartition(".")[0] for name in public_names()} | set(MODULES) <= shown


def test_every_command_is_in_the_reference():
    tools = {path.stem for path in (tiny.REPOSITORY / "flowdcn_jax" / "tools").glob("[a-z]*.py")}
    page = (REFERENCE / "commands.md").read_text()
    assert set(re.findall(r"^::: flowdcn_jax\.tools\.(\w+)$", page, re.MULTILINE)) == tools


def test_a_site_without_a_public_name_is_refused(tmp_path, monkeypatch):
    exceptions = pytest.importorskip("mkdocs.exceptions")
    monkeypatch.syspath_prepend(tiny.REPOSITORY / "docs" / "_build")
    import public_names as hook

    names = [found.path for found in public_names().values()]
    config = type("Config", (), {"site_dir": tmp_path})

    def build(names):
        lines = "".join(f"{name} py:function 1 x.html#$ -\n" for name in names)
        header = b"# Sphinx inventory version 2\n# Project: x\n# Version: 0\n# zlib\n"
        (tmp_path / "objects.inv").write_bytes(header + zlib.compress(lines.encode()))
        hook.on_post_build(config)

    build(names)
    names.remove("flowdcn_jax.samplers.solve.solve")
    with pytest.raises(exceptions.PluginError, match="reference: flowdcn_jax.samplers.solve$"):
        build(names)
