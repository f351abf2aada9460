"""What happens to folders: full disks, damage, other processes, file systems without locks."""

import contextlib
import errno
import fcntl
import resource
import subprocess
import sys

HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write("process 7 on elsewhere\\n")
lock.flush()
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another_process(folder):
    """Another process holds the lock of `folder` until the block, or its input, ends."""
    command = [sys.executable, "-S", "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"locked\n"
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def full_disk(free_bytes):
    """No file of this process may become larger, as if the disk were full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def without_locks(monkeypatch):
    """The file system has no locks; there is no such one at hand."""

    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def flipped(content, index, bit=0):
    """The bytes `content` with one bit of byte `index` changed."""
    changed = bytearray(content)
    changed[index] ^= 1 << bit
    return changed
