"""Whose fault an exception is, decided in one place: the input's, a damaged file's, the machine's.

What the machine did may pass (a network file system that stalls, too many open files, a device or
another host that was lost): it is tried again where that can be done, and otherwise the command
ends with the status TRY_AGAIN. For a disk that is full nobody but a person can do something:
MAKE_ROOM. A file is damaged if what is in it is wrong, and never because it could not be read.

Libraries raise exceptions of their own for what the system said; its words in their message tell.
Imports no JAX.
"""

import errno
import functools
import logging
import os
import re
import struct
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from flowdcn_jax.errors import UserError

# Exit statuses. 0 is done, a traceback ends in 1. sysexits.h has 74 and 75.
BAD_INPUT = 2
MAKE_ROOM = 74
TRY_AGAIN = 75

WAITS_S = (0.5, 2.0, 8.0)  # before a read is tried again; then it has failed

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PASSING = (
    errno.EIO,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.EREMOTEIO,
    errno.ENOLCK,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
)
_BY_TEXT = {os.strerror(number): number for number in (*_FULL, *_PASSING)}
_SYSTEM = re.compile("|".join(map(re.escape, _BY_TEXT)), re.IGNORECASE)

# Of devices, their links and other processes: what XLA, Gloo, NCCL and TensorStore say.
_LOST = re.compile(
    r"DEADLINE_EXCEEDED|UNAVAILABLE|Gloo \S+ failed|NCCL|heartbeat|Connection closed by peer|"
    r"CUDA_ERROR_(ECC_UNCORRECTABLE|DEVICE_UNAVAILABLE|DEINITIALIZED|NO_DEVICE|UNKNOWN)|"
    r"Barrier timed out"
)
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|CUDA_ERROR_OUT_OF_MEMORY")

# What threads of libraries print once their work has failed and the loops that ran it are gone.
_AFTERMATH = re.compile(
    r"Event loop is closed|handle is closed|cannot schedule new futures"
    r"|^Encountered error while reading array index"  # Orbax's, of a part that is then read again
)

# What readers raise at content that is not what was written.
_CONTENT = (
    ValueError,
    KeyError,
    EOFError,
    IndexError,
    FileNotFoundError,
    NotADirectoryError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class DamagedError(Exception):
    """A file that is not what was written; the message says in which respect."""


class MachineError(UserError):
    """What the machine did; the message says it. The same command goes on later."""

    def __init__(self, message: str, status: int = TRY_AGAIN):
        super().__init__(message)
        self.status = status


def status_of(error: BaseException) -> int | None:
    """The exit status for an exception; None: a bug, which keeps its traceback."""
    machine = machine_status(error)
    if machine is not None:
        return machine
    return BAD_INPUT if isinstance(error, (UserError, OSError)) else None


def machine_status(error: BaseException) -> int | None:
    """MAKE_ROOM or TRY_AGAIN if the machine did it; None: it did not, as far as can be told."""
    for each in _chain(error):
        if isinstance(each, MachineError):
            return each.status
        if isinstance(each, OSError) and each.errno is not None:
            if each.errno in _FULL:
                return MAKE_ROOM
            if each.errno in _PASSING:
                return TRY_AGAIN
            continue
        if isinstance(each, UserError):
            continue  # its message may quote; its cause is looked at
        text = str(each)
        if found := _SYSTEM.search(text):
            number = next(n for words, n in _BY_TEXT.items() if words.lower() == found[0].lower())
            return MAKE_ROOM if number in _FULL else TRY_AGAIN
        if isinstance(each, MemoryError) or _LOST.search(text):
            return TRY_AGAIN
        if _NO_MEMORY.search(text):
            return MAKE_ROOM
    return None


def is_lost_link(text: str) -> bool:
    """Whether an exception's text is about a connection to another process."""
    return re.search(r"Gloo \S+ failed|NCCL|Connection closed by peer|heartbeat", text) is not None


def is_damage(error: BaseException) -> bool:
    """Whether reading a file met content that is not what was written, and nothing else."""
    if isinstance(error, DamagedError):
        return True
    if machine_status(error) is not None:
        return False
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return True  # a place before the file's beginning, of which a damaged one tells
    # array_record and zipfile raise RuntimeError itself, XLA a class of its own, Orbax Exception.
    return isinstance(error, _CONTENT) or type(error) in (RuntimeError, Exception)


def as_line(error: BaseException) -> str:
    """An exception in one line, with the file that it is about."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        names = [shown(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([" -> ".join(names), error.strerror]) if names else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    found = _SYSTEM.search(text)
    path = re.search(r"(?<![\w.])/[^\s:;,\"'\]]+", text)
    if found and path:
        return f"{path[0]}: {found[0]}"
    return f"{type(error).__name__}: {text}"[:300]


def shown(path: Any) -> str:
    """A path as a message shows it, whatever bytes its name has."""
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def retried(read: Callable[[], Any], *, what: str = "") -> Any:
    """`read()`, tried again a few times, after longer and longer, where what failed may pass.

    Args:
        read: may be called several times.
        what: what is read, for the warnings.

    Raises:
        what `read` raised last.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return read()
        except Exception as error:
            if wait_s is None or machine_status(error) != TRY_AGAIN:
                raise
            text = as_line(error)
            logging.warning(
                "%s%s; trying again in %g s", f"{what}: " * (what not in text), text, wait_s
            )
            time.sleep(wait_s)


def hush() -> None:
    """Keeps background threads of libraries from printing what the machine did.

    Each of Orbax's would print a page. What they met is raised where their work is waited for, and
    told in a line there.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_no_machine)
    for module, hook in ((threading, "excepthook"), (sys, "unraisablehook")):
        setattr(module, hook, functools.partial(_unless_machine, getattr(module, hook)))


def _no_machine(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    about = error if error is not None else Exception(record.getMessage())
    return record.levelno < logging.ERROR or not _is_told(about)


def _unless_machine(hook: Callable, unraised: Any) -> None:
    if unraised.exc_value is None or not _is_told(unraised.exc_value):
        hook(unraised)


def _is_told(error: BaseException) -> bool:
    return machine_status(error) is not None or _AFTERMATH.search(str(error)) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and what led to it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
