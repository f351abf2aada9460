"""Time and memory of a conversion: python -m tests.published_weights.measure CONFIG

Makes a safetensors file of random weights of a config's shapes (configs/CONFIG.py), has the command
convert it, and prints what that took as JSON, beside what a narrow model takes.
"""

import json
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from flowdcn_jax.config import load_config
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


def convert(name: str, folder: Path, width: int | None = None) -> dict:
    """What the command takes for configs/`name`.py, or such a model of another width.

    Megabytes are 10^6 bytes; peak_mb is the whole process's, Python and its libraries too.
    """
    config = load_config(name)
    flags = [f"--config=configs/{name}.py"]
    if width:
        config.model.width = width
        flags.append(f"--config.model.width={width}")
    tensors = official_tensors(config.model, tokens_per_side=16)
    sizes_mb = [4e-6 * np.prod(tensor.shape) for tensor in tensors.values()]
    source = folder / f"{width}.safetensors"
    write_random(source, tensors)
    flags += [f"--source={source}", f"--workdir={folder / f'run{width}'}"]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    code, output = tiny.run([sys.executable, "-m", "flowdcn_jax.tools.convert_checkpoint", *flags])
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0, output
    return dict(
        weights_mb=round(sum(sizes_mb)),
        largest_tensor_mb=round(max(sizes_mb), 1),
        peak_mb=round(used.ru_maxrss * 1024 / 1e6),  # of this child and those before it
        seconds=round(seconds, 1),
        cpu_seconds=round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1),
    )


def measure(name: str) -> dict:
    """`convert`, and what its memory exceeds that of a model as deep, with narrow tensors, by.

    That one needs Python, the libraries and what they keep of each tensor, but hardly any weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        narrow = convert(name, Path(folder), width=48)
        wide = convert(name, Path(folder))
    scales_mb = wide["peak_mb"] - narrow["peak_mb"] + narrow["weights_mb"]
    return wide | dict(
        narrow_peak_mb=narrow["peak_mb"], beyond_weights_mb=scales_mb - wide["weights_mb"]
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
