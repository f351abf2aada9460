"""The --config flag of commands: one line in place of the traceback of what it cannot read."""

import contextlib
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from flowdcn_jax.errors import ConfigError, UserError

_NAME = "config"
_unset: dict[str, None] = {}  # keys that the command line sets to None
_MODULE = f"{_NAME}_config"  # the name under which config_flags runs the file

flags.disclaim_key_flags()  # --config is a flag of the command that asks for it


def define_config_flag(*, default: str | None = None, required: bool = False) -> flags.FlagHolder:
    """Defines --config, a file whose get_config() returns the config."""
    holder = config_flags.DEFINE_config_file(
        _NAME,
        default,
        help_string="A file such as configs/s2.py, or the name of one of the project's own, such "
        "as s2. docs/config.md lists every key; --config.KEY=VALUE sets any of them.",
        lock_config=True,
    )
    if required:
        flags.mark_flag_as_required(_NAME)
    return holder


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, for commands with and without --config; returns what is not a flag.

    Raises:
        UserError: a flag that is unknown, missing or out of range; a ConfigError if it is a key of
            the config, or if the file does not load.
    """
    try:
        argv, folder = _with_path(argv)
        argv, unset = _without_nones(argv)
        with _importable(folder):
            remaining = flags.FLAGS(argv)
    except Exception as error:
        message = _where_in_file(error)
        if message is not None:
            raise ConfigError(message) from error
        if isinstance(error, flags.Error):
            raise UserError(_one_line(error)) from error
        if isinstance(error, AttributeError) and error.name == "get_config":
            raise ConfigError(f"the file of --{_NAME} has no function get_config()") from error
        if isinstance(error, OSError):  # config_flags' form of a missing file, and a key set in it
            reason = str(error).splitlines()[-1].strip()
            raise ConfigError(f"--{_NAME} cannot be loaded: {reason}") from error
        if isinstance(error, (AttributeError, KeyError)):  # config_flags' form of an unknown key
            raise ConfigError(f"unknown key in --{_NAME}: {_one_line(error)}") from error
        raise
    flag = flags.FLAGS[_NAME] if _NAME in flags.FLAGS else None
    if flag is not None and flag.present and not isinstance(flag.value, ConfigDict):
        raise ConfigError(
            f"--{_NAME}={flag.config_filename} cannot be loaded; expected a file such as "
            "configs/s2.py, with a get_config() that returns a ConfigDict"
        )
    if flag is not None and flag.present:
        from flowdcn_jax.config import modernise  # not for commands without a config: it is heavy

        modernise(flag.value)
        _set_none(flag.value, unset)
    return remaining


def _without_nones(argv: list[str]) -> tuple[list[str], list[str]]:
    """(argv without --config.KEY=None, the keys): absl would read a number, or a text, there."""
    found = [re.fullmatch(rf"--?{_NAME}\.(.+)=None", argument) for argument in argv]
    rest = [argument for argument, match in zip(argv, found, strict=True) if not match]
    return rest, [match[1] for match in found if match]


def _set_none(config: ConfigDict, keys: list[str]) -> None:
    """Raises ConfigError for a key that None is no value of."""
    from flowdcn_jax.config import lookup, optional_keys

    _unset.clear()
    for key in keys:
        if key not in optional_keys():
            raise ConfigError(f"config.{key} is None; expected {lookup(config, key)!r} or its like")
        section, _, name = key.rpartition(".")
        setattr(lookup(config, section) if section else config, name, None)
        _unset[key] = None


def _with_path(argv: list[str]) -> tuple[list[str], str | None]:
    """(argv with the file in place of the name of one of the project's own configs, its folder)."""
    for place, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag != f"--{_NAME}":
            continue
        if not equals and place + 1 < len(argv):
            argv = [*argv[:place], f"{flag}={argv[place + 1]}", *argv[place + 2 :]]
            return _with_path(argv)
        if "." not in value and "/" not in value:
            from flowdcn_jax.config import config_names, configs_folder  # heavy

            if value in config_names():
                value = f"{configs_folder() / value}.py"
        folder = str(Path(value).absolute().parent)
        return [*argv[:place], f"{flag}={value}", *argv[place + 1 :]], folder
    return argv, None


@contextlib.contextmanager
def _importable(folder: str | None) -> Iterator[None]:
    """A config file may import the modules that lie beside it, wherever it is."""
    if folder is None:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def overrides() -> dict[str, Any]:
    """Key -> value of the --config.KEY=VALUE that were given."""
    return dict(config_flags.get_override_values(flags.FLAGS[_NAME])) | _unset


def _where_in_file(error: BaseException | None) -> str | None:
    """FILE:LINE and the error, if running the config file is what caused it; else None."""
    while error is not None:
        if isinstance(error, SyntaxError):
            return f"{error.filename}:{error.lineno}: {error.msg}"
        frames = [
            (frame.f_code.co_filename, line)
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__") == _MODULE
        ]
        if frames:
            file, line = frames[-1]
            return f"{file}:{line}: {_one_line(error)}"
        error = error.__cause__ or error.__context__  # absl wraps some, and keeps them there
    return None


def _one_line(error: BaseException) -> str:
    cause = error.args[0] if error.args else error
    if isinstance(cause, Exception):  # ConfigDict wraps a KeyError in an AttributeError
        cause = cause.args[0] if cause.args else cause
    return " ".join(str(cause).split())
