"""The processes of one job: when one ends, all end within a bounded time, and each says why.

Every process says every BEAT_S seconds, in the store of JAX's coordination service (which is in
process 0), that it is there. Process 0 takes one that has said nothing for LOST_S for lost. What
ends the job, that or an error in any process, is written to the store once, and every process ends
with that line and status. If process 0 is lost, JAX ends the others with SIGABRT within seconds;
they then say so and end with TRY_AGAIN.

Processes that are in a collective operation cannot save: the job goes on from its last checkpoint.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from flowdcn_jax.faults import TRY_AGAIN, is_lost_link

BEAT_S = 2.0
LOST_S = 60.0  # of silence: a process that compiles or swaps may be slow
_GONE = "gone"  # what a process that is done says

_ENDED = "flowdcn_jax/ended"
_BEATS = "flowdcn_jax/beats/"

_watch: "_Watch | None" = None


def join() -> None:
    """Watches the other processes from here on; after jax.distributed.initialize."""
    from jax._src import distributed  # JAX exposes its store nowhere else

    global _watch
    state = distributed.global_state
    if state.num_processes > 1:
        _watch = _Watch(state.client, state.process_id, state.num_processes)
        atexit.register(_watch.done)  # before JAX's own, which waits for the others


def leave(problem: str | None = None, status: int = 0) -> None:
    """This process has done its part, or ends all the others with `problem`; once, at the end."""
    if _watch is not None:
        if problem is None:
            _watch.done()
        else:
            _watch.end(problem, status)


def own_name() -> str:
    """What messages call this process."""
    number = "" if _watch is None else f"process {_watch.number} on "
    return f"{number}{socket.gethostname()}"


class _Watch:
    """The thread of one process."""

    def __init__(self, client: Any, number: int, count: int):
        self.number = number
        self._client = client
        self._count = count
        self._state = "0"
        self._ending = False
        self._answered_s = time.monotonic()  # the store
        self._seen: dict[str, tuple[str, float]] = {}  # process: what it said, and since when
        if number:
            self._catch_abort()
            threading.Thread(target=self._find_silence, daemon=True).start()
        threading.Thread(target=self._run, daemon=True).start()

    def done(self) -> None:
        """Waits for nothing: JAX's own exit does."""
        self._state = _GONE

    def end(self, problem: str, status: int) -> None:
        """Tells the others; returns for this process to print its own error."""
        if is_lost_link(problem):  # the other end is lost: within this time all know which it is
            time.sleep(LOST_S + 3 * BEAT_S)
        self._ending = True
        self._tell(f"{own_name()}: {problem}", status)
        sys.stdout.flush()
        if not self.number:  # its store must be there until the others have read it
            deadline = time.monotonic() + 4 * BEAT_S
            while time.monotonic() < deadline and len(self._others_gone()) < self._count - 1:
                time.sleep(BEAT_S / 4)
        atexit.register(_leave_now, status)

    def _tell(self, line: str, status: int) -> None:
        with contextlib.suppress(Exception):  # another one was first
            self._client.key_value_set(_ENDED, json.dumps({"line": line, "status": status}))

    def _others_gone(self) -> list[str]:
        with contextlib.suppress(Exception):
            beats = dict(self._client.key_value_dir_get(_BEATS))
            return [name for name, told in beats.items() if _said(told) == _GONE]
        return []

    def _run(self) -> None:
        beats = 0
        while True:
            beats += 1
            if self._state != _GONE:
                self._state = str(beats)
            with contextlib.suppress(Exception):  # JAX notices by itself that the store is lost
                told = json.dumps([self._state, socket.gethostname()])
                key = f"{_BEATS}{self.number}"
                self._client.key_value_set(key, told, allow_overwrite=True)
                self._answered_s = time.monotonic()
                self._look()
            time.sleep(BEAT_S)

    def _look(self) -> None:
        if not self.number:
            self._find_lost()
        try:
            found = self._client.key_value_try_get(_ENDED)
        except Exception:  # there is nothing yet
            return
        if self._ending or self._state == _GONE:
            return
        ended = json.loads(found)
        with contextlib.suppress(Exception):
            told = json.dumps([_GONE, ""])
            self._client.key_value_set(f"{_BEATS}{self.number}", told, allow_overwrite=True)
        _print(f"error: {ended['line']}; {own_name()} ends too")
        if not self.number:
            time.sleep(2 * BEAT_S)  # for the others to read it
        os._exit(ended["status"])

    def _find_silence(self) -> None:
        """Where process 0 stands still, so does what asks it."""
        while time.monotonic() - self._answered_s < LOST_S:
            time.sleep(BEAT_S)
        self._lost_first(f"it has said nothing for {LOST_S:g} s")

    def _find_lost(self) -> None:
        now = time.monotonic()
        for name, told in self._client.key_value_dir_get(_BEATS):
            if self._seen.get(name, ("", 0))[0] != told:
                self._seen[name] = (told, now)
        for name, (told, since) in self._seen.items():
            if _said(told) != _GONE and now - since > LOST_S:
                who = f"process {name.rpartition('/')[2]} on {json.loads(told)[1]}"
                line = f"{who} has said nothing for {LOST_S:g} s; the same command goes on"
                self._tell(line, TRY_AGAIN)

    def _catch_abort(self) -> None:
        """Where JAX aborts because process 0 is lost: a line, and a status to try again on.

        A Python handler would wait for the main thread, which waits for process 0.
        """

        def aborted(signum: int) -> None:
            self._lost_first("JAX's lines above say how")

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    def _lost_first(self, how: str) -> None:
        _print(
            f"error: {own_name()} has lost process 0, which keeps the processes of the job "
            f"together ({how}); the same command goes on"
        )
        os._exit(TRY_AGAIN)


def _said(told: str) -> str:
    return json.loads(told)[0]


def _print(line: str) -> None:
    os.write(2, f"\n{line}\n".encode(errors="backslashreplace"))


def _leave_now(status: int) -> None:
    """Instead of JAX's own exit, which would wait for processes that have ended."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
