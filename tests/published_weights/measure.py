"""Time and memory of a conversion: python -m tests.published_weights.measure CONFIG

Makes a safetensors file of random weights of a config's shapes (configs/CONFIG.py), converts it,
and prints what that took as JSON.
"""

import importlib
import json
import re
import struct
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from flowdcn_jax.published_weights import convert
from flowdcn_jax.published_weights.names import official_tensors


def write_random(path: Path, tensors: dict) -> None:
    """A safetensors file, written a tensor at a time: the format's own writer wants them all."""
    rng = np.random.default_rng(0)
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * int(np.prod(tensor.shape))
        header[name] = dict(dtype="F32", shape=tensor.shape, data_offsets=(begin, end))
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            random = tensor.path is not None
            value = rng.random(tensor.shape, np.float32) if random else tensor.constant
            file.write(value.tobytes())


def resident_mb(key: str) -> float:
    """VmRSS: what this process holds; VmHWM: the most that it held. Megabytes (10^6 bytes)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def measure(name: str) -> dict:
    config = importlib.import_module(f"configs.{name}").get_config()
    tensors = official_tensors(config.model, tokens_per_side=16)
    sizes_mb = [4e-6 * np.prod(tensor.shape) for tensor in tensors.values()]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "random.safetensors"
        write_random(source, tensors)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before_mb, start, start_cpu = resident_mb("VmRSS"), time.perf_counter(), time.process_time()
        convert(source, config, Path(folder) / "run")
        return dict(
            weights_mb=round(sum(sizes_mb)),
            largest_tensor_mb=round(max(sizes_mb), 1),
            before_mb=round(before_mb),
            peak_mb=round(resident_mb("VmHWM")),
            seconds=round(time.perf_counter() - start, 1),
            cpu_seconds=round(time.process_time() - start_cpu, 1),
        )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(measure(sys.argv[1])))
