"""The machine: what a measurement was made on, and where its compiled programs are kept."""

import datetime
import importlib.metadata
import logging
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax.extend import backend

from flowdcn_jax.errors import UserError
from flowdcn_jax.files import user_cache
from flowdcn_jax.version import __version__

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "scipy",
    "grain",
    "array-record",
    "tensorflow-datasets",
    "pillow",
)


def keep_compiled_programs(folder: str | None) -> None:
    """Has JAX keep compiled programs in `folder`, for processes to come; "off": nowhere.

    None: where JAX_COMPILATION_CACHE_DIR says, else in XDG_CACHE_HOME (~/.cache), except on CPUs:
    hosts of another kind, if they share a home, would find programs that they cannot run.

    Raises:
        UserError: the folder cannot be made. The default one is then gone without.
    """
    asked_for = folder is not None
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not asked_for:
        if jax.config.jax_compilation_cache_dir or jax.default_backend() == "cpu":
            return
        folder = user_cache() / "compiled"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if asked_for:
            raise UserError(f"--compilation_cache={folder} cannot be made: {error}") from error
        logging.warning("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def describe_machine() -> dict[str, Any]:
    """CPU, cores, devices, driver, versions, date (UTC) and load of this machine, for JSON."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [device.device_kind for device in jax.devices()],
        "driver": _nvidia_driver(),
        "platform": " ".join(backend.get_backend().platform_version.split()),
        "python": platform.python_version(),
        "versions": {"flowdcn_jax": __version__}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "load_average": os.getloadavg()[0],
    }


def _nvidia_driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.split("\n")[0].strip() or None if result.returncode == 0 else None
