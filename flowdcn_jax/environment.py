"""What a measurement was made on, to be written beside it."""

import datetime
import importlib.metadata
import platform
import subprocess

import jax
from jax.extend import backend

from flowdcn_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax")


def describe() -> dict[str, str | int | None]:
    """The devices, their driver (None unless NVIDIA's), the versions, and the date (UTC)."""
    return {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "driver": _nvidia_driver(),
        "platform": " ".join(backend.get_backend().platform_version.split()),
        "python": platform.python_version(),
        "flowdcn_jax": __version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
    }


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.split("\n")[0].strip() or None if result.returncode == 0 else None
