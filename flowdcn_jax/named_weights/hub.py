"""One file of a Hugging Face hub, by its own client: its cache, its resume, its login.

HF_ENDPOINT names another hub, HF_HOME and HF_HUB_CACHE another cache. Imports no JAX.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowdcn_jax import faults
from flowdcn_jax.named_weights.table import File, NamedWeightsError


def hub_file(
    file: File, *, revision: str | None, offline: bool, again: bool = False
) -> tuple[Path, str]:
    """(path in the hub's cache, commit) of a file, fetched if it is not there.

    Args:
        file: of a hub's repository.
        revision: commit that it was of; None: the newest.
        offline: fetch nothing.
        again: fetch it even if it is there: what is there is damaged.

    Raises:
        NamedWeightsError: no client, no such file or no right to it, or it is not in the cache and
            nothing may be fetched.
        flowdcn_jax.faults.MachineError: the network, the hub, or a disk that is full.
    """
    client = _client(file)
    endpoint = os.environ.get("HF_ENDPOINT") or client.constants.ENDPOINT
    options = dict(repo_id=file.repo, filename=file.name, revision=revision, endpoint=endpoint)
    if not again:
        found = _call(client, file, **options, local_files_only=True)
        if found is not None:
            return found, _commit(found)
    if offline:
        raise NamedWeightsError(
            f"{file.name} of {file.repo} is not in the hub's cache, or damaged there, and nothing "
            "is fetched offline; expected the command without --offline and HF_HUB_OFFLINE first"
        )

    # It tries again by itself.
    found = _call(client, file, **options, local_files_only=False, force_download=again)
    if found.stat().st_size > file.limit_bytes:
        raise NamedWeightsError(
            f"{file.name} of {file.repo} is {found.stat().st_size:,} bytes long; expected "
            f"{file.limit_bytes:,} at most"
        )
    return found, _commit(found)


def told_sha256(path: Path) -> str | None:
    """The SHA-256 that the hub gave for a large file: its name in a cache that has links."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def _client(file: File) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise NamedWeightsError(
            f"{file.name} is on a hub ({file.source}), whose client is not installed: pip install "
            "huggingface_hub, or flowdcn-jax[hub]"
        ) from error
    return huggingface_hub


def _call(client: Any, file: File, *, local_files_only: bool, **options: Any) -> Path | None:
    """hf_hub_download; None where it would have to fetch and may not.

    Raises:
        NamedWeightsError: what a person has to mend.
        flowdcn_jax.faults.MachineError: what may pass.
    """
    errors, where = client.errors, f"{file.name} of {file.repo}"
    try:
        with _quietly():
            found = client.hf_hub_download(**options, local_files_only=local_files_only)
    except errors.LocalEntryNotFoundError as error:
        if local_files_only:
            return None
        cause = error.__cause__ or error
        raise faults.MachineError(
            f"{where} cannot be fetched from {options['endpoint']}: {_line(cause)}"
        ) from error
    except errors.GatedRepoError as error:
        raise NamedWeightsError(
            f"{where}: the hub asks for a login that may read it (hf auth login)"
        ) from error
    except errors.EntryNotFoundError as error:
        raise NamedWeightsError(f"{where}: the hub has no such file") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NamedWeightsError(
            f"{where}: the hub has no such repository, or not the commit that was fetched first; "
            "--accept_change takes what it has now"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        kind = faults.MachineError if status >= 500 or status == 429 else NamedWeightsError
        raise kind(f"{where}: the hub answers HTTP {status}") from error
    except (TypeError, AttributeError, NameError):
        raise  # a bug
    except Exception as error:
        machine = faults.machine_status(error)
        raise faults.MachineError(
            f"{where} cannot be fetched: {_line(error)}", machine or faults.TRY_AGAIN
        ) from error
    return Path(found)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the client's lines for each attempt: what stays is told in one."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _commit(path: Path) -> str:
    """The commit in .../snapshots/COMMIT/FILE."""
    parts = path.parts
    return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
