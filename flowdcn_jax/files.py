"""Files and folders that are either whole or not there."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flowdcn_jax.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][\w+.-]+:)/+([^/]*)", re.ASCII)  # of a URL; Path leaves one slash


def local_path(path: str | os.PathLike) -> Path:
    """The path, with the home for `~`; every path that a user names passes here.

    Raises:
        UserError: a URL, which the system would take for a folder named "gs:"; or the home of a
            user whom there is not.
    """
    text = os.fspath(path)
    if url := _SCHEME.match(text):
        raise UserError(
            f"{text} is not a path of this machine; expected one: mount {url[1]}//{url[2]} "
            "(gcsfuse, mount-s3 and rclone do it) and name the folder in it"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text} begins with the home of nobody here") from error


def local_path_text(path: str) -> str:
    """As `local_path`, for values that are texts.

    Raises:
        UserError: a URL.
        TypeError: no text.
    """
    if not isinstance(path, str):
        raise TypeError("a path")
    return str(local_path(path))


def user_cache() -> Path:
    """The project's folder in the user's cache: in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowdcn_jax"


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Errors of a file that the block has opened get its name, as those of paths have."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` that takes its place once the block ends without error.

    Missing folders are made. If the block fails, `path` stays as it was and nothing is left over.
    """
    with naming(path), atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """As `atomic_write`, for writers that open files themselves: gives the temporary's path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield Path(temporary)
        flush(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place once the block ends without error.

    `path` must not exist, or be an empty folder. If the block fails, nothing is left over.
    """
    path = Path(os.path.realpath(path))  # where a link points to
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush(path: str | os.PathLike) -> None:
    """Waits until a file's content, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
