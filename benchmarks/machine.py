"""What a measurement was made on."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "flax", "numpy", "grain", "array-record", "tensorflow-datasets", "pillow")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, devices, driver, versions, date and load of this machine, in JSON's types."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [device.device_kind for device in jax.devices()],
        "driver": _driver(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "date": datetime.date.today().isoformat(),
        "load_average": os.getloadavg()[0],
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return lines[0].strip() if lines else None
