"""What a measurement was made on."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "flax", "numpy", "grain", "array-record", "tensorflow-datasets", "pillow")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, devices, versions, date, and how busy the machine was, in the types of JSON."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "date": datetime.date.today().isoformat(),
        "load_average": os.getloadavg()[0],
    }
