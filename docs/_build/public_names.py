"""MkDocs hook: a build fails if the reference lacks a public name.

Functions that have a module's name are there under the path of their definition.
"""

import zlib
from pathlib import Path

from mkdocs.exceptions import PluginError

from tests.public_names import public_names


def on_post_build(config) -> None:
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes()
    lines = zlib.decompress(inventory.split(b"\n", 4)[4]).decode().splitlines()
    there = {line.split()[0] for line in lines}
    missing = [name for name, found in public_names().items() if not {name, found.path} & there]
    if missing:
        raise PluginError(f"not in the reference: {', '.join(missing)}")
