"""How fast models train: FlowDCN beside SiT of the same size, without their data.

    python -m benchmarks.training --out=docs/training.json
    python -m benchmarks.training --models=xl2,sit_xl2 --image_size=512 --batch_size=8 --devices=8
    python -m benchmarks.training --models=s2,sit_s2,xl2,sit_xl2 --objectives=velocity,mean_flow

Each row is the step that train.py runs (loss, gradients, AdamW, EMA, the state donated), from a
model's initial values on random latents that are on the devices already. Every step starts from
what the one before has made. Programs are compiled before the first is timed.

"ms" is a step's share of a run of several steps, the median of the runs. "GiB" is what the program
takes of each device: arguments (parameters, optimizer and EMA), results and temporary buffers, as
XLA assigned them. "of the first" is images/s over those of the first row, "of its velocity" a
step's time over that of the same model's velocity step, where both are measured.

--objectives=mean_flow is MeanFlow with its defaults (a derivative for a quarter of the rows, no
guidance in the target), mean_flow_guided with two passes more for guidance, as XL/2 was published.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from benchmarks.memory import process_peak_bytes, program_bytes
from benchmarks.steps import compile_step, random_batch
from flowdcn_jax import command
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.config import config_names, load_config, validate
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.models import parameter_count
from flowdcn_jax.precision import compute_dtype
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import abstract_state, initial_state
from pallas_kernels.timing import median_ms, none_if_out_of_memory

# What each sets beside a model's config.
OBJECTIVES = {
    "velocity": {},
    "mean_flow": {"flow.objective": "mean_flow", "model.second_time": True},
}
OBJECTIVES["mean_flow_guided"] = OBJECTIVES["mean_flow"] | {
    "flow.mean_flow.guidance_omega": 0.2,
    "flow.mean_flow.guidance_kappa": 0.92,
    "sampling.guidance": 1.0,
}

_MODELS = flags.DEFINE_list("models", ["b2", "sit_b2", "xl2", "sit_xl2"], "Configs of configs/.")
_OBJECTIVES = flags.DEFINE_list("objectives", ["velocity"], f"Some of {', '.join(OBJECTIVES)}.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images, pixels.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images a device.", 1)
_DEVICES = flags.DEFINE_integer("devices", 1, "Local devices to use, the first ones.", 1)
_RUNS = flags.DEFINE_integer("runs", 5, "Runs of each model, of which the median counts.", 1)
_STEPS = flags.DEFINE_integer("steps", 10, "Steps of a run; one run more warms up.", 1)
_OUT = command.define_path("out", "JSON file to write.")

_COLUMNS = (
    "model | objective | parameters (M) | batch a device | ms | images/s | GiB | of the first | "
    "of its velocity"
)


def main() -> None:
    out = file_to_write(_OUT)
    mesh = _make_mesh()
    configs = {
        (name, objective): _load_config(name, objective, mesh)
        for name in _MODELS.value
        for objective in _OBJECTIVES.value
    }
    report = {"machine": describe_machine(), "results": []}
    with ThreadPoolExecutor() as pool:  # a compilation keeps one core busy, and no more
        compiling = pool.map(
            lambda config: none_if_out_of_memory(compile_step, config, mesh), configs.values()
        )
        bar = tqdm(compiling, desc="compiling", unit="model", total=len(configs))
        programs = dict(zip(configs, bar, strict=True))
    print(f"| {_COLUMNS} |")
    print("| --- " * (_COLUMNS.count("|") + 1) + "|")
    for row, config in configs.items():
        _add(report["results"], _measure(*row, config, mesh, programs[row]))
    write_json(out, report)


def _make_mesh() -> Mesh:
    """The first devices of this machine, each with a copy of the parameters."""
    devices = jax.local_devices()
    if _DEVICES.value > len(devices):
        raise UserError(f"--devices is {_DEVICES.value}; expected at most {len(devices)}, all here")
    return make_mesh(devices=devices[: _DEVICES.value])


def _load_config(name: str, objective: str, mesh: Mesh) -> ConfigDict:
    """The config of configs/`name`.py with an objective and the flags' sizes.

    Raises:
        UserError: there is none, or it does not go with them.
    """
    if objective not in OBJECTIVES:
        raise UserError(
            f"--objectives names {objective!r}; expected some of {', '.join(OBJECTIVES)}"
        )
    if name not in config_names():
        raise UserError(f"--models names {name!r}; expected some of {', '.join(config_names())}")
    config = load_config(name)
    config.update_from_flattened_dict(OBJECTIVES[objective])
    config.data.image_size = _IMAGE_SIZE.value
    config.data.aspect_buckets.count = 0
    config.train.batch_size = _BATCH_SIZE.value * mesh.size
    validate(config, mesh.size, 1)
    return config


def _measure(
    name: str,
    objective: str,
    config: ConfigDict,
    mesh: Mesh,
    program: jax.stages.Compiled | None,
) -> dict[str, Any]:
    """A row of the results; what memory did not suffice for is None."""
    step_ms = program and none_if_out_of_memory(_time_step, config, mesh, program)
    rows = config.train.batch_size
    return {
        "model": name,
        "objective": objective,
        "parameters": parameter_count(abstract_state(config, mesh).params),
        "image_size": config.data.image_size,
        "num_devices": mesh.size,
        "batch_size": rows // mesh.size,
        "dtype": jnp.dtype(compute_dtype(config.model.dtype)).name,
        "step_ms": step_ms,
        "images_per_s": step_ms and rows / step_ms * 1e3,
        "program_bytes": program and program_bytes(program),
        "process_peak_bytes": process_peak_bytes(mesh.devices.flat),
        "config": config.to_dict(),
    }


def _time_step(config: ConfigDict, mesh: Mesh, program: jax.stages.Compiled) -> float:
    """Milliseconds a step.

    Raises:
        FloatingPointError: the loss became infinite or NaN, so that the steps were not real ones.
    """
    batch = random_batch(config, mesh)
    state, metrics = initial_state(config, mesh), {}

    def run():
        nonlocal state, metrics
        for _ in range(_STEPS.value):
            state, metrics = program(state, batch)
        return state

    run_ms = median_ms(run, runs=_RUNS.value)
    if not np.isfinite(metrics["loss"]):
        raise FloatingPointError(f"the loss became {metrics['loss']}")
    return run_ms / _STEPS.value


def _add(results: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Adds a row to the results, with what it is of the others, and prints it."""
    results.append(row)
    first, rate = results[0]["images_per_s"], row["images_per_s"]
    row["of_the_first"] = rate / first if rate and first else None
    same = [r for r in results if (r["model"], r["objective"]) == (row["model"], "velocity")]
    velocity = same[0]["images_per_s"] if same else None
    row["of_its_velocity"] = velocity / rate if rate and velocity else None
    cells = [row["model"], row["objective"], f"{row['parameters'] / 1e6:.2f}"]
    cells.append(str(row["batch_size"]))
    if rate is None:
        cells += ["out of memory", "", "", "", ""]
    else:
        cells += [
            f"{row['step_ms']:.2f}",
            f"{rate:.1f}",
            f"{row['program_bytes'] / 2**30:.2f}",
            f"{row['of_the_first']:.2f}" if first else "",
            f"{row['of_its_velocity']:.2f}" if velocity else "",
        ]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    command.run(main)
