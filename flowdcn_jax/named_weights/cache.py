"""The cache of weights by name: a folder a name, which one process at a time changes.

    FLOWDCN_CACHE/NAME/record.json   SHA-256 and source of each file, of what is made of them too
                       files/        what came over HTTP; a hub's files stay in the hub's own cache
                       made/         what was made of the files, such as a workdir
                       .lock         held by the process that fetches or makes; others wait

Every use reads the files that it needs in full and compares their SHA-256 with the record. What
differs is fetched or made anew, and must be what it was.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowdcn_jax.errors import UserError
from flowdcn_jax.faults import DamagedError
from flowdcn_jax.files import atomic_folder, atomic_write
from flowdcn_jax.named_weights import hub, transfer
from flowdcn_jax.named_weights.table import (
    File,
    NamedWeights,
    NamedWeightsError,
    cache_folder,
    find,
)
from flowdcn_jax.runs.folder import LOCK_FILE, lock

RECORD_FILE, FILES_FOLDER, MADE_FOLDER = "record.json", "files", "made"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the hub's own variables
_YES = ("1", "ON", "YES", "TRUE")

Make = Callable[[Mapping[str, Path], Path], None]  # (files by name, folder to fill)


def fetch(name: str, *, accept_change: bool = False) -> dict[str, Path]:
    """{name: path} of the files that a name stands for, fetched where they are not there.

    Args:
        name: of the table.
        accept_change: fetch them anew, and keep to what the source has now.

    Raises:
        NamedWeightsError: an unknown name; a source that has something else than before; nothing
            may be fetched and something is missing or damaged.
        flowdcn_jax.faults.MachineError: the network, or a disk that is full.
    """
    with _entry(name) as entry:
        return entry.files(accept_change=accept_change)


def prepared(name: str, make: Make, *, accept_change: bool = False) -> Path:
    """The folder that `make` has filled from the files of a name; it is called once.

    The files themselves are not needed any more while that folder is whole.

    Args:
        name: of the table.
        make: fills an empty folder; always in the same way.
        accept_change: see `fetch`.

    Raises:
        as `fetch`, and what `make` raises.
    """
    with _entry(name) as entry:
        if not accept_change and entry.made_is_whole():
            return entry.made
        return entry.make(make, entry.files(accept_change=accept_change))


def is_prepared(name: str) -> bool:
    """Whether `prepared` was called, as far as can be told without reading the files."""
    return (folder_of(name) / MADE_FOLDER).is_dir()


def folder_of(name: str) -> Path:
    """The folder of a name in the cache, which may not be there.

    Raises:
        NamedWeightsError: an unknown name.
    """
    find(name)
    return cache_folder().absolute() / name


def remove(name: str) -> bool:
    """Deletes what is in a name's folder; False if nothing is. A hub's cache stays as it is."""
    folder = folder_of(name)
    if not folder.is_dir():
        return False
    with _locked(folder):  # the lock itself stays, for those who wait for it
        found = [path for path in folder.iterdir() if path.name != LOCK_FILE]
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return bool(found)


def summary(name: str) -> str:
    """What of a name is in the cache, in a word or two, as far as the record says."""
    folder = folder_of(name)
    if not (folder / RECORD_FILE).exists():
        return "begun" if any(folder.glob(f"{FILES_FOLDER}/*.part")) else "-"
    return "converted" if (folder / MADE_FOLDER).is_dir() else "fetched"


def offline() -> bool:
    """Whether nothing may be fetched: the hub's own variables say so, which --offline sets."""
    return any(os.environ.get(name, "").upper() in _YES for name in OFFLINE)


@contextlib.contextmanager
def _entry(name: str) -> Iterator["_Entry"]:
    """The folder of a name, which no other process changes until the block ends."""
    weights, folder = find(name), folder_of(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NamedWeightsError(
            f"{folder} cannot be made a folder: {error.strerror}; FLOWDCN_CACHE names another"
        ) from error
    with _locked(folder):
        yield _Entry(name, weights, folder)


class _BusyError(UserError):
    """Another process has the lock."""


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        held = lock(folder, error=_BusyError)
    except _BusyError:
        print(f"waiting for another process, which works on {folder}", file=sys.stderr)
        held = lock(folder, error=_BusyError, wait=True)
    with held:
        yield


@dataclasses.dataclass
class _Entry:
    """A name's folder, while this process holds its lock."""

    name: str
    weights: NamedWeights
    folder: Path

    def __post_init__(self):
        self.made = self.folder / MADE_FOLDER
        self._record = self._read_record()
        self._commits: dict[str, str] = {}  # of repositories, in this use

    def files(self, *, accept_change: bool) -> dict[str, Path]:
        """As `fetch`."""
        return {file.name: self._file(file, accept_change) for file in self.weights.files}

    def made_is_whole(self) -> bool:
        """Whether every file that was made is there and what it was.

        Raises:
            NamedWeightsError: not so, and other files lie between them.
        """
        expected = self._record["made"]
        found = _hashes(self.made)
        wrong = [each for each in expected if expected[each] != found.get(each)]
        if not wrong:
            return bool(expected)
        if others := sorted(found.keys() - expected):
            raise NamedWeightsError(
                f"{self.made / wrong[0]} is damaged, and is not made anew, since {others[0]} lies "
                "there too, which is of others; expected it elsewhere"
            )
        logging.warning("%s is damaged and is made anew", self.made / wrong[0])
        return False

    def make(self, make: Make, files: Mapping[str, Path]) -> Path:
        """As `prepared`, from files that are there."""
        shutil.rmtree(self.made, ignore_errors=True)
        self._record["made"] = {}
        self._write_record()
        with atomic_folder(self.made) as folder:
            make(files, folder)
            made = _hashes(folder)
        self._record["made"] = made
        self._write_record()
        return self.made

    def _file(self, file: File, accept_change: bool) -> Path:
        """A file of this name that is what the record says; it is fetched if it is not."""
        known = {} if accept_change else self._record["files"].get(file.name, {})
        get = self._from_hub if file.repo else self._from_url
        for again in (True,) if accept_change else (False, True):
            path, source = get(file, known, again=again)
            found = sha256_of(path)
            told = hub.told_sha256(path) if file.repo else None
            expected = [each for each in (known.get("sha256"), file.sha256, told) if each]
            wrong = [each for each in expected if not found.startswith(each)]
            if not wrong:
                break
        else:
            raise transfer.SourceChangedError(
                f"{file.name} of {file.source} has SHA-256 {found}; expected {wrong[0]}. "
                + self._remedy()
            )
        now = {"sha256": found, "bytes": path.stat().st_size} | source
        if now != self._record["files"].get(file.name):
            self._record["files"][file.name] = now
            self._write_record()
        return path

    def _from_hub(self, file: File, known: dict, *, again: bool) -> tuple[Path, dict]:
        # That of before; else that of this name's files before it, so that they lie in one folder;
        # else, as where the user takes what is there now, the newest.
        revision = known.get("commit") or self._commits.get(file.repo)
        options = dict(revision=revision, offline=offline())
        if again:
            self._say_that_damaged(file, known)
        path, commit = hub.hub_file(file, again=again, **options)
        self._commits[file.repo] = commit
        return path, {"repo": file.repo, "commit": commit}

    def _from_url(self, file: File, known: dict, *, again: bool) -> tuple[Path, dict]:
        path = self.folder / FILES_FOLDER / file.name
        source = {"url": file.url}
        if again:
            self._say_that_damaged(file, known)
        # A file without a line in the record: the process that fetched it ended before it wrote
        # one. Nothing tells whether it is whole, so it is not used.
        elif path.exists() and known:
            return path, source
        if offline():
            raise NamedWeightsError(
                f"{file.name} is not in {path.parent}, or damaged there, and nothing is fetched "
                "offline; expected the command without --offline and HF_HUB_OFFLINE first"
            )
        expected = known.get("sha256") or file.sha256
        try:
            transfer.download(file.url, path, limit_bytes=file.limit_bytes, sha256=expected)
        except transfer.SourceChangedError as error:
            raise transfer.SourceChangedError(f"{error}. {self._remedy()}") from error
        return path, source

    def _remedy(self) -> str:
        return (
            "The source has changed, or what came was changed on its way: it is not used. python "
            f"-m flowdcn_jax.tools.weights fetch {self.name} --accept_change takes what is there "
            "now"
        )

    def _say_that_damaged(self, file: File, known: dict) -> None:
        if known:
            logging.warning("%s of %s is damaged and is fetched anew", file.name, self.name)

    def _read_record(self) -> dict[str, Any]:
        path = self.folder / RECORD_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            for section in ("files", "made"):
                if not isinstance(record[section], dict):
                    raise DamagedError(f"{section} is no table")
            for each in record["files"].values():
                if len(bytes.fromhex(each["sha256"])) != hashlib.sha256().digest_size:
                    raise DamagedError("a SHA-256 is none")
        except FileNotFoundError:
            return {"files": {}, "made": {}}
        except (ValueError, KeyError, TypeError, AttributeError, DamagedError) as error:
            raise NamedWeightsError(
                f"{path} is damaged ({error}), and nothing else tells what the files were; python "
                f"-m flowdcn_jax.tools.weights remove {self.name} deletes them"
            ) from error
        return record

    def _write_record(self) -> None:
        with atomic_write(self.folder / RECORD_FILE) as file:
            file.write(json.dumps(self._record, indent=2).encode() + b"\n")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes; "" if it is not there."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _hashes(folder: Path) -> dict[str, str]:
    """{path in the folder: SHA-256} of all files in it."""
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
