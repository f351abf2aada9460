"""Runs side by side: a process a GPU, or several, until all are done or time is over."""

import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.runs import REPOSITORY, Call, digest

GRACE_S = 120  # for a command that is asked to stop, to save
SHARE_OF_MEMORY = 0.9  # of a GPU, for all processes on it

# (command, environment, log file) -> a process with poll(), terminate() and kill()
Start = Callable[[list[str], dict[str, str], Path], Any]


class Stopped(Exception):
    """Time is over, or somebody asked to stop; the same command goes on."""


class Failed(Exception):
    """A command ended with another status than 0; the message names its log."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def start_process(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    """Starts a command in the project's folder; what it prints goes to the end of `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the study, which asks each to stop
        )


def gpus() -> list[str]:
    """Numbers of the GPUs that may be used; none on a machine without."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [each for each in visible.split(",") if each]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(number) for number in range(listed.stdout.count("\n"))]


def environments(side_by_side: int) -> list[dict[str, str]]:
    """The environment of each process that may run at a time."""
    common = os.environ | {"PYTHONUNBUFFERED": "1"}
    found = gpus()
    if not found:
        return [common] * side_by_side
    if side_by_side > 1:
        share = SHARE_OF_MEMORY / side_by_side
        common = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"} | common
    return [common | {"CUDA_VISIBLE_DEVICES": gpu} for _ in range(side_by_side) for gpu in found]


class Schedule:
    """Jobs in the order given, each on the first place that is free.

    SIGTERM, SIGHUP, Ctrl-C and the end of the time ask every process to stop, and wait for it.
    """

    def __init__(
        self,
        places: Sequence[dict[str, str]],
        *,
        minutes: float | None = None,
        start: Start = start_process,
    ):
        """`places`: the environments of the processes; `minutes`: when time is over."""
        self._places, self._start = places, start
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def run(self, jobs: Sequence[Callable[[dict[str, str]], None]]) -> list[Exception]:
        """Calls each job with an environment, in a thread; returns what they raised.

        A job that raises Stopped is left for another day, others do not wait for it.
        """
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        errors: list[Exception] = []

        def work(environment: dict[str, str]) -> None:
            while not self.stopped:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    job(environment)
                except Stopped:
                    return
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=work, args=(each,)) for each in self._places]
        with _asked_to_stop(self._stop):
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._stop.set()
                for thread in threads:
                    thread.join(0.2)
        return errors

    def caller(self, folder: Path, environment: dict[str, str], commands: list[str]) -> Call:
        """What runs the commands of one run, and keeps in `folder` which are done.

        Args:
            folder: of logs, files and marks.
            environment: of the processes.
            commands: each is added as text.
        """
        folder.mkdir(parents=True, exist_ok=True)

        def call(name: str, command: list[str], *, out: bool = False) -> Path:
            stem = f"{name}-{digest(command)}"
            done, result = folder / f"{stem}.done", folder / f"{stem}.json"
            commands.append(shlex.join(["python", *command[1:]]))
            if not done.exists():
                full = [*command, f"--out={result}"] if out else command
                self.wait(full, environment, folder / f"{name}.log")
                done.touch()
            return result

        return call

    def wait(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        """Runs a command to its end.

        Raises:
            Stopped: it was asked to stop, or ended with a status that says the same command goes
                on.
            Failed: it ended otherwise.
        """
        if self.stopped:
            raise Stopped
        process = self._start(command, environment, log)
        while process.poll() is None:
            if self.stopped:
                process.terminate()
                end = time.monotonic() + GRACE_S
                while process.poll() is None and time.monotonic() < end:
                    time.sleep(0.1)
                if process.poll() is None:
                    process.kill()
                raise Stopped
            time.sleep(0.1)
        if (status := process.poll()) == 0:
            return
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        told = f"{log} ends: {lines[-1] if lines else 'nothing'}"
        raise Failed(f"{shlex.join(command[1:4])} ... ended with status {status}; {told}", status)


class _asked_to_stop:
    """While it is open, SIGTERM, SIGHUP and Ctrl-C set the event."""

    _SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def __init__(self, event: threading.Event):
        self._event = event

    def __enter__(self) -> None:
        def ask(*_: Any) -> None:
            self._event.set()

        self._before = [signal.signal(each, ask) for each in self._SIGNALS]

    def __exit__(self, *_: Any) -> None:
        for each, handler in zip(self._SIGNALS, self._before, strict=True):
            signal.signal(each, handler)
