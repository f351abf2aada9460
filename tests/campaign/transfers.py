"""Transfers that are interrupted or corrupted: what the cache gives is right, or it gives nothing.

A case fetches a file of a tiny model several times while the server cuts, stalls, or sends other
bytes, ranges, lengths, pages or another file than it should, or the process is killed; then once
without faults, and once without a network.
"""

import contextlib
import io
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from flowdcn_jax import faults, named_weights
from flowdcn_jax.errors import UserError
from flowdcn_jax.named_weights import table
from tests.conftest import REPOSITORY
from tests.named_weights import server as serve
from tests.named_weights import tiny_names
from tests.named_weights.world import world

# The same file at a hub, at a URL with the hash in the table, and at one that nothing tells of.
PATHS = {
    "tiny": "/owner/tiny/tiny.safetensors",
    "tiny-told": "/files/tiny.safetensors",
    "tiny-url": "/files/tiny.safetensors",
}
KINDS = ("cut", "stall", "range", "length", "page", "flip", "error", "change", "kill", "mixed")
ROUNDS = 3
CONTENT = tiny_names.model_file()
OTHER = CONTENT[:-4] + b"\0\0\x80?"  # a whole file, too


def case(number: int) -> tuple[str, str]:
    """(source and kind of fault, what came of it)."""
    generator = random.Random(number)
    name, kind = sorted(PATHS)[number % len(PATHS)], KINDS[number // len(PATHS) % len(KINDS)]
    with (
        tempfile.TemporaryDirectory() as folder,
        serve.serving() as server,
        world(Path(folder), server.url),
        mock.patch.object(faults, "WAITS_S", (0, 0, 0)),
        contextlib.redirect_stderr(io.StringIO()),  # bars
    ):
        logging.disable(logging.ERROR)
        try:
            return f"{kind}, {name}", _run(generator, server, name, kind)
        except AssertionError as error:
            error.kind = f"{kind}, {name}"
            raise
        finally:
            logging.disable(logging.NOTSET)


def _run(generator: random.Random, server: serve.Server, name: str, kind: str) -> str:
    server.files[PATHS[name]] = CONTENT
    user, lines = _User(server, name), 0
    for number in range(ROUNDS):
        one = generator.choice(KINDS[:-2]) if kind == "mixed" else kind
        if number and user.path is not None:  # what is there would else be given without a transfer
            _damage(user.path, generator)
        if one == "kill":
            _killed_fetch(server, name, generator)
            continue
        if one == "change" and number:
            server.files[PATHS[name]] = OTHER
        told = name != "tiny-url" or user.first is not None
        faults_to_come = range(generator.randint(1, 9))
        server.faults = [_fault(one, generator, server, told=told) for _ in faults_to_come]
        lines += user.fetch() is not None
    server.faults = []
    if (line := user.fetch()) is not None:
        # Only a file that the table, or the first transfer, says to be another.
        assert server.files[PATHS[name]] == OTHER and "SHA-256" in line, line
        return "one line: the source has changed"
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
        server.requests.clear()
        assert user.fetch() is None and not server.requests, "it is not there without a network"
    return "one line, then right" if lines else "right at once"


class _User:
    """Fetches a name again and again, and looks at what it gets."""

    def __init__(self, server: serve.Server, name: str):
        self.path: Path | None = None  # of the file, once it was there
        self.first: bytes | None = None  # what it was then
        self._server, self._name = server, name

    def fetch(self) -> str | None:
        """The line, if there is one; else what was given is right.

        Raises:
            AssertionError: other bytes were given, several lines, or a part by the file's name.
        """
        try:
            (self.path,) = named_weights.fetch(self._name).values()
        except (UserError, OSError) as error:
            assert faults.status_of(error) is not None
            line = faults.as_line(error)
            assert "\n" not in line, line
            if self.path is None:
                found = named_weights.folder_of(self._name) / "files" / "tiny.safetensors"
                assert not found.exists(), "a part by the file's name"
            return line
        given = self.path.read_bytes()
        if self.first is None:
            told = self._name == "tiny-told"
            assert given == CONTENT if told else given in (CONTENT, OTHER), "other bytes"
            self.first = given
        assert given == self.first, "other bytes than those of before"
        return None


def _damage(path: Path, generator: random.Random) -> None:
    how = generator.choice(["flip", "cut", "remove"])
    content = bytearray(path.read_bytes() if path.exists() else b"")
    place = generator.randrange(len(content) or 1)
    if how == "remove" or not content:
        path.unlink(missing_ok=True)
        return
    if how == "flip":
        content[place] ^= 1 << generator.randrange(8)
    path.write_bytes(content if how == "flip" else content[:place])


def _fault(kind: str, generator: random.Random, server: serve.Server, *, told: bool) -> serve.Fault:
    place = generator.randrange(len(CONTENT))
    if kind == "stall":
        return serve.stalled(place, server.ended)
    if kind == "range":
        shift, honest = generator.randint(1, 5000), generator.random() < 0.5
        cut, moved = serve.cut(place), serve.range_from(shift, honest=honest)
        # A range is asked for where something was cut.
        return lambda reply, request: (moved if reply.status == 206 else cut)(reply, request)
    if kind == "length":
        return serve.declared(generator.choice([-1, 1]) * generator.randint(1, 5000))
    if kind == "page":
        return generator.choice([serve.page, serve.quiet_page])
    if kind == "flip" and told:  # else nothing could tell
        return serve.flipped(place)
    if kind == "error":
        return serve.status(generator.choice([403, 404, 429, 500, 503]))
    return serve.cut(place)


def _killed_fetch(server: serve.Server, name: str, generator: random.Random) -> None:
    """A process that fetches and is killed, mostly in the middle of it."""
    server.faults = [serve.stalled(generator.randrange(len(CONTENT)), server.ended)]
    environment = os.environ | {
        tiny_names.ADDRESS: server.url,
        "HF_HUB_CACHE": str(Path(os.environ["FLOWDCN_CACHE"]).parent / "hub"),
    }
    command = [sys.executable, "-m", "tests.campaign.transfers", name]
    asked = len(server.requests)
    process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not any(
            method == "GET" for method, _, _ in server.requests[asked:]
        ):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1))
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    table.TABLE.update(tiny_names.names(os.environ[tiny_names.ADDRESS]))
    named_weights.fetch(sys.argv[1])
