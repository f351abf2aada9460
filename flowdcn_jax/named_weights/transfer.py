"""One file over HTTP: whole, the one that was asked for, or not there. Imports no JAX.

What has arrived lies beside the file as NAME.part, and what the server called it as NAME.part.tag:
a transfer that was cut goes on from there, if the server still has the same.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import requests
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from flowdcn_jax import faults
from flowdcn_jax.files import atomic_write, flush, naming
from flowdcn_jax.named_weights.table import NamedWeightsError

CONNECT_S, SILENCE_S = 10.0, 30.0  # until a server answers; between two pieces
MAX_REDIRECTS = 5
PIECE_BYTES = 2**18
PROGRESS_BYTES = 2**22  # an attempt that brought as much does not count as one that failed
_HTML = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
_HEAD_BYTES = 16
_PASSING = (408, 425, 429)  # HTTP: besides 500 and above, what may be other in a minute


class SourceChangedError(NamedWeightsError):
    """The source has something else than it had, or than the table says."""


class _Answer(NamedTuple):
    """What a response promises."""

    start: int  # of its bytes in the file
    total_bytes: int
    tag: str | None  # what the server calls this content: for going on with it


def download(
    url: str,
    path: Path,
    *,
    limit_bytes: int,
    sha256: str = "",
    silence_s: float | None = None,
    progress: bool = True,
) -> str:
    """Brings `url` to `path`, which is then there as a whole, and replaced; returns its SHA-256.

    What may pass (no network, a stall, a transfer that is cut) is tried again, from where it
    stopped. What has arrived then stays as NAME.part, for the next call.

    Args:
        url: http or https; redirects are followed, but not from https to http.
        path: of the file.
        limit_bytes: more is refused, before it is fetched.
        sha256: how it must begin; "": any.
        silence_s: between two pieces, before the transfer counts as stalled.
        progress: show a bar.

    Raises:
        SourceChangedError: another SHA-256.
        NamedWeightsError: the server has no such file, or sends a page, or more than the limit.
        flowdcn_jax.faults.MachineError: what may pass stayed, or the disk is full.
        OSError: the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    options = dict(limit_bytes=limit_bytes, silence_s=silence_s or SILENCE_S, progress=progress)
    with requests.Session() as session:
        session.max_redirects = MAX_REDIRECTS
        faults.retried(lambda: _while_it_goes_on(session, url, part, **options), what=url)
    _check_content(url, path.name, part)
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        forget_part(path)
        raise SourceChangedError(f"{url} has SHA-256 {found}; expected {sha256}")
    flush(part)
    os.replace(part, path)
    forget_part(path)
    return found


def forget_part(path: Path) -> None:
    """Deletes what a cut transfer of `path` has left, if there is anything."""
    _discard(_part_of(path))


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_of(part).unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _tag_of(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _while_it_goes_on(session: requests.Session, url: str, part: Path, **options: Any) -> None:
    """Attempts, as long as each brings a good piece of the file."""
    while True:
        before = _size(part)
        try:
            return _attempt(session, url, part, **options)
        except faults.MachineError as error:
            if error.status != faults.TRY_AGAIN or _size(part) < before + PROGRESS_BYTES:
                raise
            logging.warning("%s; going on", error)


def _attempt(
    session: requests.Session,
    url: str,
    part: Path,
    *,
    limit_bytes: int,
    silence_s: float,
    progress: bool,
) -> None:
    """Asks for what is missing of `part` and appends it, until it is whole."""
    tag = _read_tag(part)
    have = _size(part) if tag else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with _as_machine_error(url):
        response = session.get(url, headers=headers, stream=True, timeout=(CONNECT_S, silence_s))
    with response:
        _check_way(url, response)
        answer = _read_answer(url, response, part, asked=have)
        if answer.total_bytes > limit_bytes:
            _discard(part)
            raise NamedWeightsError(
                f"{url} is {answer.total_bytes:,} bytes long; expected {limit_bytes:,} at most"
            )
        _check_room(part, answer.total_bytes - answer.start)
        if not answer.start:
            _begin(part, answer.tag)
        _receive(url, response, part, answer, progress=progress)
    if _size(part) != answer.total_bytes:
        raise faults.MachineError(
            f"{url} ended after {_size(part):,} of {answer.total_bytes:,} bytes"
        )


def _read_answer(url: str, response: requests.Response, part: Path, *, asked: int) -> _Answer:
    """What the response promises, once it is found to be the file from `asked` or from 0 on.

    Raises:
        NamedWeightsError: an error, a page, or a body of a length that is not told.
        flowdcn_jax.faults.MachineError: an error that may pass, or another range.
    """
    status, headers = response.status_code, response.headers
    if status == 416 or (status == 206 and not asked):
        _discard(part)
        raise faults.MachineError(f"{url} does not go on where the last transfer stopped")
    if status >= 500 or status in _PASSING:
        raise faults.MachineError(f"{url} answers HTTP {status} {response.reason}")
    if status not in (200, 206):
        raise NamedWeightsError(f"{url} answers HTTP {status} {response.reason}; expected a file")
    if headers.get("Content-Type", "").startswith("text/html"):
        raise NamedWeightsError(
            f"{url} sends a web page in the place of a file; a login page of the network, perhaps"
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise NamedWeightsError(
            f"{url} sends the file as {headers['Content-Encoding']}; expected it as it is"
        )
    tag = headers.get("ETag")
    tag = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
    length = headers.get("Content-Length", "")
    if not length.isdecimal():
        raise NamedWeightsError(
            f"{url} does not tell how long the file is; expected Content-Length"
        )
    if status == 200:
        return _Answer(0, int(length), tag)
    told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
    start, last, total = map(int, told.groups()) if told else (-1, -1, -1)
    right = (start, last + 1, start + int(length)) == (asked, total, total)
    if not right or tag != _read_tag(part):
        _discard(part)
        raise faults.MachineError(
            f"{url} was asked for the bytes from {asked} on and answers "
            f"{headers.get('Content-Range')!r}; beginning anew"
        )
    return _Answer(start, total, tag)


def _receive(
    url: str, response: requests.Response, part: Path, answer: _Answer, *, progress: bool
) -> None:
    bar = tqdm(
        total=answer.total_bytes,
        initial=answer.start,
        desc=Path(part.stem).name,
        unit="B",
        unit_scale=True,
        disable=not progress,
        dynamic_ncols=True,
    )
    with bar, naming(part), open(part, "ab") as file:
        for piece in _pieces(url, response):
            file.write(piece)
            bar.update(len(piece))


def _pieces(url: str, response: requests.Response) -> Iterator[bytes]:
    """The body; what the network does to it is a MachineError, what the disk does is not."""
    pieces = response.iter_content(PIECE_BYTES)
    while True:
        with _as_machine_error(url):
            piece = next(pieces, b"")
        if not piece:
            return
        yield piece


@contextlib.contextmanager
def _as_machine_error(url: str) -> Iterator[None]:
    """What a request meets on its way, in one line."""
    try:
        yield
    except requests.TooManyRedirects as error:
        raise NamedWeightsError(
            f"{url} redirects more than {MAX_REDIRECTS} times; expected a file"
        ) from error
    except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
        raise NamedWeightsError(
            f"{url} redirects to what is no http address ({_cause(error)}); expected a file"
        ) from error
    except requests.RequestException as error:
        raise faults.MachineError(f"{url} cannot be fetched: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """What lies under the layers of an HTTP client's exception."""
    text = " ".join(str(error).split())
    if isinstance(error, requests.Timeout) or "timed out" in text:
        return "the server does not answer, or stopped sending"
    if rest := re.search(r"IncompleteRead\(\d+ bytes read, (\d+) more", text):
        return f"the connection was closed {int(rest[1]):,} bytes before the end"
    system = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text)
    return system[1] if system else text[:200]


def _check_way(url: str, response: requests.Response) -> None:
    """Raises NamedWeightsError if a redirect left https."""
    addresses = [each.url for each in (*response.history, response)]
    safe = [address.startswith("https:") for address in addresses]
    if safe[0] and not all(safe):
        raise NamedWeightsError(
            f"{url} redirects to {addresses[safe.index(False)]}; expected https"
        )


def _check_room(part: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(part.parent).free
    if free_bytes < needed_bytes:
        raise faults.MachineError(
            f"{part.parent} has {free_bytes / 1e6:,.0f} MB free; expected "
            f"{needed_bytes / 1e6:,.0f} MB, as the file needs",
            faults.MAKE_ROOM,
        )


def _check_content(url: str, name: str, part: Path) -> None:
    """Raises NamedWeightsError for a page, or no whole file of the kind that its name says."""
    with open(part, "rb") as file:
        head = file.read(_HEAD_BYTES)
    try:
        whole = _KINDS.get(Path(name).suffix, lambda part, head: True)(part, head)
    except (SafetensorError, ValueError):
        whole = False
    if whole:
        return
    _discard(part)
    what = "a web page" if _HTML.match(head) else f"no whole such file: it begins with {head!r}"
    raise NamedWeightsError(f"{url} sends {what} in the place of {name}")


def _is_safetensors(part: Path, head: bytes) -> bool:
    with safe_open(part, framework="numpy"):  # compares its length with what its header says
        return True


def _is_torch(part: Path, head: bytes) -> bool:
    """A zip archive, whose end is there; or the older form, which does not tell."""
    return zipfile.is_zipfile(part) if head[:2] == b"PK" else head[:1] == b"\x80"


def _is_json(part: Path, head: bytes) -> bool:
    return isinstance(json.loads(part.read_bytes()), dict)


_KINDS = {
    ".safetensors": _is_safetensors,
    ".pth": _is_torch,
    ".pt": _is_torch,
    ".json": _is_json,
}


def _begin(part: Path, tag: str | None) -> None:
    """An empty file; one that is cut here is empty too, and so goes on with nothing else."""
    _discard(part)
    if tag is not None:
        with atomic_write(_tag_of(part)) as file:
            file.write(json.dumps(tag).encode())
    part.touch()


def _read_tag(part: Path) -> str | None:
    try:
        tag = json.loads(_tag_of(part).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return tag if isinstance(tag, str) else None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
