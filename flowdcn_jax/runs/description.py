"""What a run is: printed when it starts, and kept in its folder as config.json."""

import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from flowdcn_jax.config import flatten
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.files import atomic_write
from flowdcn_jax.models import parameter_count

FILE = "config.json"


def describe(
    config, changed: dict[str, Any], mesh: Mesh, params: Any, *, origin: dict[str, Any] | None
) -> dict[str, Any]:
    """What decides a run, in the types of JSON.

    Args:
        config: of the run.
        changed: the keys that were set beside the config's file.
        mesh: the devices.
        params: the parameters, or their shapes.
        origin: the record of the weights that it begins with, of `initial_weights.find`.

    Returns:
        {"config": with every key, "changed" and "origin" as given, "mesh": its axes' sizes,
        "parameters": their number, "machine": devices, versions and date}.
    """
    return {
        "config": json.loads(config.to_json()),
        "changed": json.loads(json.dumps(changed)),
        "origin": origin,
        "mesh": dict(mesh.shape),
        "parameters": parameter_count(params),
        "machine": describe_machine()
        | {"devices": [device.device_kind for device in mesh.devices.flat]},
    }


def as_text(description: dict[str, Any]) -> str:
    """The description as people read it: a line a section, changed keys marked with a star."""
    config, machine = description["config"], description["machine"]
    devices = machine["devices"]
    sections: dict[str, list[str]] = {}
    for key, value in flatten(config).items():
        section, _, name = key.rpartition(".")
        star = "*" if key in description["changed"] else ""
        sections.setdefault(section, []).append(f"{name}={value}{star}")
    lines = [f"{section or 'config'}: {' '.join(keys)}" for section, keys in sections.items()]
    mesh = " x ".join(f"{axis}={size}" for axis, size in description["mesh"].items())
    versions = " ".join(f"{name} {machine['versions'][name]}" for name in ("jax", "flax"))
    return "\n".join(
        [
            *lines,
            f"{description['parameters'] / 1e6:.1f} M parameters on {len(devices)} x {devices[0]} "
            f"({mesh}), flowdcn_jax {machine['versions']['flowdcn_jax']}, {versions}",
        ]
    )


def write(workdir: Path, description: dict[str, Any]) -> None:
    """Writes WORKDIR/config.json, whole or not at all; the newest start's takes its place."""
    with atomic_write(workdir / FILE) as file:
        file.write((json.dumps(description, indent=1) + "\n").encode())
