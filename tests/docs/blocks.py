"""The code blocks of a page in Markdown."""

import re
from pathlib import Path
from typing import NamedTuple

NOT_RUN = re.compile(r"<!-- not run: .+ -->\n$")
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Attributes:
    language: bash or python.
    text: what is in it.
    file: the name of the file that it shows; None: it is to be run.
    """

    language: str
    text: str
    file: str | None


def read_blocks(page: Path) -> list[Block]:
    """Those in bash and Python, without what a comment above says is not run, and why."""
    text = page.read_text()
    return [
        Block(found[1], found[3], found[2])
        for found in _BLOCK.finditer(text)
        if found[1] in ("bash", "python") and not NOT_RUN.search(text[: found.start()])
    ]
