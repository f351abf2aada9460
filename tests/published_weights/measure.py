"""Time and memory of a conversion: python -m tests.published_weights.measure CONFIG

Makes a safetensors file of random weights of a config's shapes (configs/CONFIG.py), has the command
convert it, and prints what that took as JSON.
"""

import importlib
import json
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from flowdcn_jax.published_weights.names import official_tensors
from tests import tiny


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


def measure(name: str) -> dict:
    """Megabytes are 10^6 bytes; peak_mb is the whole process's, Python and its libraries too."""
    config = importlib.import_module(f"configs.{name}").get_config()
    tensors = official_tensors(config.model, tokens_per_side=16)
    sizes_mb = [4e-6 * np.prod(tensor.shape) for tensor in tensors.values()]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "random.safetensors"
        write_random(source, tensors)
        start = time.perf_counter()
        command = [sys.executable, "-m", "flowdcn_jax.tools.convert_checkpoint"]
        flags = [f"--source={source}", f"--config=configs/{name}.py", f"--workdir={folder}/run"]
        code, output = tiny.run([*command, *flags])
        seconds = time.perf_counter() - start
    assert code == 0, output
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak_mb = used.ru_maxrss * 1024 / 1e6
    return dict(
        weights_mb=round(sum(sizes_mb)),
        largest_tensor_mb=round(max(sizes_mb), 1),
        peak_mb=round(peak_mb),
        beyond_weights_mb=round(peak_mb - sum(sizes_mb)),
        seconds=round(seconds, 1),
        cpu_seconds=round(used.ru_utime + used.ru_stime, 1),
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
