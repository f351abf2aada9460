"""Where the milliseconds of a training step go, by kind of work, on a GPU.

    python -m benchmarks.step_profile --models=xl2,sit_xl2 --batch_size=64 --out=profile.json

Some steps of random latents run under JAX's profiler. Each kernel counts as what the instruction of
the compiled program is that started it. "busy" is the sum of all kernels, "span" the time from the
first to the last; what is between them, the device waited. Command buffers are off meanwhile, as
their kernels do not tell which instruction they belong to: that costs some of the time between
kernels, not in them.
"""

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from benchmarks.kernel_times import by_kind, kernels_of
from benchmarks.steps import compile_step, random_batch
from flowdcn_jax import command
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.config import config_names, load_config, validate
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.models import random_params
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import abstract_state, initial_state

_MODELS = flags.DEFINE_list("models", ["xl2"], "Configs of configs/.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images, pixels.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images.", 1)
_STEPS = flags.DEFINE_integer("steps", 3, "Steps that are traced.", 1)
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def main() -> None:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    out = file_to_write(_OUT)
    if jax.default_backend() != "gpu":
        raise UserError(f"a profile needs a GPU; JAX's devices are {jax.devices()}")
    report = {"machine": describe_machine(), "results": []}
    for name in _MODELS.value:
        row = _profile(name)
        report["results"].append(row)
        print(f"\n{name}: busy {row['busy_ms']:.1f} of {row['span_ms']:.1f} ms a step\n")
        print("| kind | ms a step | kernels |\n| --- | --- | --- |")
        for kind in row["kinds"]:
            print(f"| {kind['kind']} | {kind['ms']:.2f} | {kind['kernels']:.0f} |", flush=True)
    write_json(out, report)


def _load_config(name: str) -> ConfigDict:
    if name not in config_names():
        raise UserError(f"--models names {name!r}; expected some of {', '.join(config_names())}")
    config = load_config(name)
    config.data.image_size = _IMAGE_SIZE.value
    config.data.aspect_buckets.count = 0
    config.train.batch_size = _BATCH_SIZE.value
    validate(config, 1, 1)
    return config


def _profile(name: str) -> dict[str, Any]:
    config, mesh = _load_config(name), make_mesh(devices=jax.local_devices()[:1])
    program, batch = compile_step(config, mesh), random_batch(config, mesh)
    shapes = abstract_state(config, mesh).params
    params = jax.device_put(random_params(shapes), jax.tree.map(lambda x: x.sharding, shapes))
    state = initial_state(config, mesh)._replace(params=params)
    for _ in range(3):  # clocks rise, buffers are taken
        state, metrics = program(state, batch)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_STEPS.value):
                state, metrics = program(state, batch)
            jax.block_until_ready((state, metrics))
        (path,) = Path(folder).rglob("*.trace.json.gz")
        kernels = kernels_of(json.loads(gzip.decompress(path.read_bytes())))
    span_us = kernels[-1].start_us + kernels[-1].duration_us - kernels[0].start_us
    return {
        "model": name,
        "batch_size": _BATCH_SIZE.value,
        "image_size": _IMAGE_SIZE.value,
        "busy_ms": sum(kernel.duration_us for kernel in kernels) / _STEPS.value / 1e3,
        "span_ms": span_us / _STEPS.value / 1e3,
        "kinds": by_kind(kernels, program.as_text(), steps=_STEPS.value),
    }


if __name__ == "__main__":
    command.run(main)
