"""What the commands share: start, errors, exit status, flags of options and processes, reports.

Imports no JAX, so that --help and usage errors come at once.
"""

import errno
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from flowdcn_jax import faults, peers
from flowdcn_jax.config_flag import parse_flags
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import atomic_write, local_path
from flowdcn_jax.options import Option, options_of

# Exit statuses, beside those in `faults`. 0 is done; a traceback ends in 1.
BAD_INPUT = faults.BAD_INPUT
STOPPED = faults.TRY_AGAIN  # training was asked to stop, and the same command goes on
INTERRUPTED = 130  # as shells say it of a command that Ctrl-C ended

flags.disclaim_key_flags()  # flags defined here are those of the command that asks for them


def run(main: Callable[..., int | None]) -> None:
    """Parses the flags, calls `main` and ends the process with what it returns (None: 0).

    A `main` with parameters gets the arguments that are no flags; without, there must be none.

    What the user can mend, in the flags or raised by `main` as a UserError, becomes one line and
    the status BAD_INPUT; what the machine did a line and a status of `faults`. --help shows the
    docstring and the flags of the module of `main`. An output that nobody reads any more, such as
    a pipe to `head`, ends nothing.
    """
    for name in ("stdout", "stderr"):
        setattr(sys, name, _Output(getattr(sys, name)))
    faults.hush()
    module = sys.modules[main.__module__]
    for flag in flags.FLAGS.get_key_flags_for_module(module):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # where --help looks
    sys.modules["__main__"].__doc__ = module.__doc__

    def guarded(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax and TFDS report every file at INFO
        try:
            arguments = argv[1:]
            if arguments and not inspect.signature(main).parameters:
                raise UserError(f"unexpected arguments: {arguments}")
            status = main(*arguments)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = INTERRUPTED
        except Exception as error:
            status = faults.status_of(error)
            peers.leave(faults.as_line(error), 1 if status is None else status)
            if status is None:
                raise
            return _report(error, status)
        peers.leave()
        return status

    def parse(argv: list[str]) -> list[str]:
        try:
            return parse_flags(argv)
        except UserError as error:
            sys.exit(_report(error, BAD_INPUT))

    app.run(guarded, flags_parser=parse)


def _report(error: Exception, status: int) -> int:
    print(f"error: {faults.as_line(error)}", file=sys.stderr)
    return status


class _Output:
    """A text stream that takes any name of a file, and drops what nobody reads any more."""

    _GONE = (errno.EPIPE, errno.EIO)  # a pipe's other end; a terminal

    def __init__(self, stream: Any):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._unless_gone(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._unless_gone(self._stream.flush)

    def _unless_gone(self, action: Callable, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if error.errno not in self._GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is buffered goes there too
            os.close(nowhere)


class _PathParser(flags.ArgumentParser):
    """Values that are local paths, with the home for `~`."""

    def parse(self, argument: str) -> str:
        return str(local_path(argument))


def define_path(name: str, help: str, *, required: bool = False) -> flags.FlagHolder:
    """Defines a flag that names a file or folder of this machine."""
    serializer = flags.ArgumentSerializer()
    return flags.DEFINE(_PathParser(), name, None, help, serializer=serializer, required=required)


def define_paths(name: str, help: str, *, required: bool = False) -> flags.FlagHolder:
    """As `define_path`, for a flag that may be given several times."""
    serializer = flags.ArgumentSerializer()
    return flags.DEFINE_multi(_PathParser(), serializer, name, None, help, required=required)


def option_flags(
    *classes: type, several: Iterable[str] = (), flag_values: flags.FlagValues = flags.FLAGS
) -> Callable[[], dict[str, Any]]:
    """Defines a flag for each option of dataclasses; see `flowdcn_jax.options`.

    Args:
        classes: the dataclasses.
        several: names of those that may have several values, which come as a list; by default
            they are None.
        flag_values: where the flags are defined; of the command unless given.

    Returns:
        A function that gives the flags' values by name, once they are parsed: keywords for what
        takes the options, which checks their ranges.
    """
    options = [option for cls in classes for option in options_of(cls).values()]
    holders = [
        flags.DEFINE_flag(_OptionFlag(option, option.name in several), flag_values)
        for option in options
    ]
    return lambda: {holder.name: holder.value for holder in holders}


class _ListParser(flags.ArgumentParser):
    """Values with commas between them, no two of them the same."""

    def __init__(self, of_one: flags.ArgumentParser):
        self._of_one = of_one

    def parse(self, argument: str) -> list[Any]:
        values = [self._of_one.parse(text.strip()) for text in argument.split(",")]
        if len(set(values)) < len(values):
            raise ValueError("expected each value once")
        return values


class _OptionFlag(flags.Flag):
    """A flag whose help is put together when it is read, for that may import JAX."""

    _PARSERS = {bool: flags.BooleanParser, int: flags.IntegerParser, float: flags.FloatParser}

    def __init__(self, option: Option, several: bool):
        self._option, self._several = option, several
        parser = self._PARSERS.get(option.type, flags.ArgumentParser)()
        parser = _ListParser(parser) if several else parser
        boolean = option.type is bool
        super().__init__(parser, None, option.name, option.default, None, boolean=boolean)

    @property
    def help(self) -> str:
        several = "; several, with commas between them, make a table" if self._several else ""
        return f"{self._option.description}{several}."

    @help.setter
    def help(self, text: str) -> None:
        """absl sets it."""


def define_device_flags() -> None:
    """Defines --compilation_cache, --distributed, and the flags that name the other processes."""
    flags.DEFINE(
        _PathParser(),
        "compilation_cache",
        None,
        "Folder that compiled programs are kept in, or off: the next start takes seconds. By "
        "default JAX_COMPILATION_CACHE_DIR, or a folder of the user's cache, except on CPUs.",
        serializer=flags.ArgumentSerializer(),
    )
    flags.DEFINE_bool("distributed", False, "Join the other processes, which run the same command.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, with --distributed.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, with --distributed.", 1)
    flags.DEFINE_integer("process_id", None, "This process's number from 0, with --distributed.", 0)


def use_devices() -> None:
    """Joins the other processes and keeps compiled programs, as the flags of `define_device_flags`
    say; comes before all other use of JAX.

    Raises:
        UserError: see `_join_processes` and `environment.keep_compiled_programs`.
    """
    _join_processes()
    from flowdcn_jax.environment import keep_compiled_programs

    keep_compiled_programs(flags.FLAGS["compilation_cache"].value)


def _join_processes() -> None:
    """Joins the other processes if --distributed says so.

    Raises:
        UserError: flags that do not fit each other, or that do not lead to the other processes.
    """
    values = flags.FLAGS
    options = {
        name: values[name].value for name in ("coordinator_address", "num_processes", "process_id")
    }
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if not values["distributed"].value:
        if given:
            raise UserError(f"{', '.join(given)} given without --distributed; expected it as well")
        return
    address, count, number = options.values()
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise UserError(f"--coordinator_address is {address!r}; expected HOST:PORT")
    if None not in (count, number) and number >= count:
        raise UserError(
            f"--process_id is {number}; expected 0 .. {count - 1}, below --num_processes"
        )

    import jax

    try:
        jax.distributed.initialize(address, count, number)
    except ValueError as error:  # there is nothing that tells what the flags leave out
        raise UserError(
            "--distributed finds no cluster (SLURM, Kubernetes, cloud TPU); elsewhere name "
            f"--coordinator_address=HOST:PORT --num_processes=N --process_id=I ({error})"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise faults.MachineError(
            f"--distributed cannot join the other processes: {str(error).splitlines()[0]}"
        ) from error
    peers.join()


def numbers(flag: flags.FlagHolder, *, at_least: int = 1) -> list[int]:
    """The numbers of a list flag, of which there must be one.

    Raises:
        UserError: one is not a number, or smaller than `at_least`.
    """
    texts = [text.strip() for text in flag.value]
    if not texts or not all(text.isdecimal() and int(text) >= at_least for text in texts):
        raise UserError(
            f"--{flag.name} is {','.join(flag.value)!r}; expected numbers of at least {at_least}, "
            "with commas between them"
        )
    return [int(text) for text in texts]


def file_to_write(flag: flags.FlagHolder) -> Path | None:
    """The path that a flag names, found writable now and not after the work; None without one.

    Raises:
        UserError: it cannot be written.
    """
    if flag.value is None:
        return None
    check_writable(Path(flag.value), flag=flag.name)
    return Path(flag.value)


def check_writable(path: Path, *, flag: str) -> None:
    """Makes the folder of a file to be written, and tries whether files can be made in it.

    Raises:
        UserError: they cannot, or `path` is a folder; it names the `flag`.
    """
    if path.is_dir():
        raise UserError(f"--{flag}={path} is a folder; expected a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be written: {error}") from error


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Writes a report, or nothing without a path."""
    if path is not None:
        with atomic_write(path) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())
