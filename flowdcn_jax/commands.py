"""What the commands of tools/ and benchmarks/ share: flags checked before work starts, reports."""

import json
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from flowdcn_jax.errors import UserError
from flowdcn_jax.files import atomic_write


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
