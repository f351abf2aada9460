"""The commands that README and docs show have the flags and keys that they show."""

import json
import re
import shlex

import pytest

from flowdcn_jax.config import SECTIONS, default_config
from flowdcn_jax.models import MODELS
from flowdcn_jax.options import options_of
from tests import forked, tiny

_COMMAND = re.compile(r"python (?:-m flowdcn_jax\.tools\.|)(\w+)(?:\.py)?(( +[^\s;&|#]+)*)")
_FLAGS_OF_TOOLS = """
import importlib, json, os, sys
from absl import flags
for name in sys.argv[1:]:
    if os.fork() == 0:  # each defines its flags in a process of its own
        importlib.import_module(f"flowdcn_jax.tools.{name}")
        print(json.dumps([name, list(flags.FLAGS)]), flush=True)
        os._exit(0)
    os.wait()
"""


def shown():
    """(page, tool, its flags) of every command in a bash block, those that are not run too."""
    pages = [tiny.REPOSITORY / "README.md", *(tiny.REPOSITORY / "docs").rglob("*.md")]
    for page in pages:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for tool, rest, _ in _COMMAND.findall(block.replace("\\\n", " ")):
                words = shlex.split(rest)
                names = [word.partition("=")[0][2:] for word in words if word.startswith("--")]
                yield page.name, tool, names


@pytest.fixture(scope="module")
def flags():
    """Tool -> the names of its flags."""
    tools = [path.stem for path in (tiny.REPOSITORY / "flowdcn_jax" / "tools").glob("[a-z]*.py")]
    status, output = forked.run(["-c", _FLAGS_OF_TOOLS, *tools])
    assert status == 0, output
    return dict(json.loads(line) for line in output.splitlines())


def test_every_flag_that_is_shown_is_there(flags):
    keys = {f"config.{name}" for name in default_config()}
    for section, cls in (
        *SECTIONS.items(),
        *(("model", model.options) for model in MODELS.values()),
    ):
        keys |= {".".join(filter(None, ("config", section, name))) for name in options_of(cls)}
    commands = [command for command in shown() if command[1] in flags]
    assert len(commands) > 40
    for page, tool, names in commands:
        for name in names:
            known = keys if name.startswith("config.") else flags[tool]
            assert name in known or name.removeprefix("no") in known, (page, tool, name)
