"""How fast images are drawn, in what memory, and how much of the time the model itself takes.

    python -m benchmarks.sampling --out=docs/sampling.json
    python -m benchmarks.sampling --devices=1,2 --image_sizes=256 --num_steps=50

Each row is a batch drawn by the compiled function that sample.py calls (noise, guidance, all
steps), with random weights; latents are not decoded. Compilation is left out.

"GiB" is what the program takes of each device: arguments (the weights are most of them), results
and temporary buffers, as XLA assigned them. "model ms" is a pass of the same batch through the
model alone, twice as large under guidance, in a loop of its own. "outside" is the share of the time
that these passes do not make up; measured apart, it can come out slightly below zero.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks.memory import process_peak_bytes, program_bytes
from flowdcn_jax import command, config_flag
from flowdcn_jax.command import file_to_write, numbers, write_json
from flowdcn_jax.config import validate
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.models import abstract_model, apply_model, random_params
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, replicated
from flowdcn_jax.sampling import (
    Settings,
    count_evaluations,
    fill_settings,
    labels_in_turn,
    make_generator,
)
from pallas_kernels.timing import median_ms

_CONFIG = config_flag.define_config_flag(default="configs/xl2.py")
_SIZES = flags.DEFINE_list("image_sizes", ["256", "512"], "Sides of the images, pixels.")
_STEPS = flags.DEFINE_list("num_steps", ["10", "50", "250"], "Steps from noise to image.")
_DEVICES = flags.DEFINE_list("devices", ["1"], "Numbers of devices to use, the first ones.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Images a device; by default 64 of 256x256, 16 of 512x512.", 1
)
_SAMPLER = flags.DEFINE_string("sampler", "euler", "As sample.py's.")
_GUIDANCE = flags.DEFINE_float("guidance", 1.375, "Guidance weight; 1: none.", 0)
_RUNS = flags.DEFINE_integer("runs", 3, "Batches of each, of which the median counts.", 1)
_OUT = command.define_path("out", "JSON file to write.")

_PIXELS = 64 * 256 * 256  # of a device's batch, by default
_PASSES = 10  # through the model alone, in one program
_COLUMNS = (
    "image | steps | devices | batch a device | images/s | of one device's rate | GiB | model ms | "
    "outside"
)


def main() -> None:
    out = file_to_write(_OUT)
    config, settings, meshes = _check_flags()
    report = {"machine": describe_machine(), "config": config.to_dict(), "results": []}
    print(f"| {_COLUMNS} |")
    print("| --- " * (_COLUMNS.count("|") + 1) + "|")
    _, shapes = abstract_model(config.model)
    weights = random_params(shapes)
    for mesh in meshes:
        params = jax.device_put(weights, replicated(mesh))
        for of_one_size in settings:
            model_ms = _time_model(config, params, mesh, of_one_size[0])
            for setting in of_one_size:
                row = _measure(config, params, mesh, setting, model_ms)
                _add(report["results"], row)
    write_json(out, report)


def _check_flags() -> tuple[ConfigDict, list[list[Settings]], list[Mesh]]:
    """(config, settings by size and steps, meshes).

    Raises:
        UserError: a value that cannot be used.
    """
    config = _CONFIG.value.copy_and_resolve_references()
    config.autoencoder.name = "preview"
    validate(config, 1, 1)
    settings = [
        [
            fill_settings(
                Settings(
                    image_size=(size, size),
                    sampler=_SAMPLER.value,
                    num_steps=num_steps,
                    guidance=_GUIDANCE.value,
                ),
                config,
            )
            for num_steps in numbers(_STEPS)
        ]
        for size in numbers(_SIZES)
    ]
    devices, counts = jax.devices(), numbers(_DEVICES)
    if max(counts) > len(devices):
        raise UserError(f"--devices names {max(counts)}; expected at most {len(devices)}, all here")
    return config, settings, [make_mesh(devices=devices[:count]) for count in counts]


def _batch_size(settings: Settings) -> int:
    """Images a device."""
    height, width = settings.image_size
    return _BATCH_SIZE.value or max(1, _PIXELS // (height * width))


def _time_model(config: ConfigDict, params, mesh: Mesh, settings: Settings) -> float:
    """Milliseconds of one pass through the model alone, of as many rows as an evaluation has."""
    velocities, passes = count_evaluations(settings)
    rows = _batch_size(settings) * mesh.size * passes // velocities
    stride = config.autoencoder.downsampling
    sides = (side // stride for side in settings.image_size)
    graphdef, _ = abstract_model(config.model)

    def run(params, x, t, y):
        def step(x, _):  # what comes out goes in, or the passes would be made once
            return apply_model(graphdef, params, x, t, y), None

        return jax.lax.scan(step, x, length=_PASSES)[0]

    noise = jax.random.normal(jax.random.key(0), (rows, *sides, config.model.in_channels))
    labels = labels_in_turn((), rows, config.model.num_classes)
    x, t, y = jax.device_put((noise, jnp.full(rows, 0.5), labels), batch_sharding(mesh))
    program = jax.jit(run, out_shardings=batch_sharding(mesh)).lower(params, x, t, y).compile()
    return median_ms(program, params, x, t, y, runs=_RUNS.value) / _PASSES


def _measure(
    config: ConfigDict, params, mesh: Mesh, settings: Settings, model_ms: float
) -> dict[str, Any]:
    """A row of the results."""
    images = _batch_size(settings) * mesh.size
    generator = make_generator(config, mesh, settings)
    indices = np.arange(images, dtype=np.uint32)
    labels = labels_in_turn((), images, config.model.num_classes)
    start_s = time.perf_counter()
    program = generator.func.lower(*generator.args, params, indices, labels).compile()
    compile_s = time.perf_counter() - start_s
    draw = functools.partial(program, *generator.args)
    batch_ms = median_ms(draw, params, indices, labels, runs=_RUNS.value)
    velocities, passes = count_evaluations(settings)
    return {
        "image_size": settings.image_size[0],
        "num_steps": settings.num_steps,
        "sampler": settings.sampler,
        "guidance": settings.guidance,
        "num_devices": mesh.size,
        "batch_size": _batch_size(settings),
        "evaluations": velocities,
        "passes_an_image": passes,
        "compile_s": compile_s,
        "batch_ms": batch_ms,
        "images_per_s": images / batch_ms * 1e3,
        "model_ms": model_ms,
        "outside_model": 1 - velocities * model_ms / batch_ms,
        "program_bytes": program_bytes(program),
        "process_peak_bytes": process_peak_bytes(mesh.devices.flat),
    }


def _add(results: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Adds a row to the results, with its rate over that of one device, and prints it."""
    same = ("image_size", "num_steps")
    alone = [r for r in [*results, row] if r["num_devices"] == 1]
    alone = [r["images_per_s"] for r in alone if all(r[key] == row[key] for key in same)]
    row["of_one_device"] = row["images_per_s"] / alone[0] if alone else None
    results.append(row)
    cells = [str(row[key]) for key in (*same, "num_devices", "batch_size")]
    cells += [
        f"{row['images_per_s']:.2f}",
        f"{row['of_one_device']:.2f}" if alone else "",
        f"{row['program_bytes'] / 2**30:.2f}",
        f"{row['model_ms']:.2f}",
        f"{row['outside_model']:.1%}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    command.run(main)
