"""How fast models train and run forward: FlowDCN beside SiT of the same size, without their data.

    python -m benchmarks.training --out=docs/throughput.json
    python -m benchmarks.training --models=xl2,sit_xl2 --passes=train,mean_flow --sizes=256x64
    python -m benchmarks.training --models=xl2 --passes=train --sizes=256x64 --meshes=1x1,2x1,1x2

"train" is the step that train.py runs (loss, gradients, AdamW, EMA, the state donated), from a
model's initial values on random latents that are on the devices already; every step starts from
what the one before has made. "mean_flow" is a step of MeanFlow with its defaults (a derivative
for a quarter of the rows, no guidance in the target), "mean_flow_guided" has guidance there, two
passes more. "forward" is the velocity of such a batch without guidance, with random parameters, on
one device. Programs are compiled before the first is timed.

"ms" is a step's share of a run of several steps, the median of the runs. "GiB" is what the program
takes of each device: arguments (of training: parameters, optimizer and EMA), results and temporary
buffers, as XLA assigned them. "of the first" is images/s over those of the first model, of the same
pass, size and mesh; "of its train" a step's time over that of "train", if that came before. Beside
FILE.json, FILE.png shows rates and memory over the images' size.
"""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from benchmarks.memory import process_peak_bytes, program_bytes
from benchmarks.steps import compile_forward, compile_step, random_batch
from flowdcn_jax import command
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.config import config_names, load_config, validate
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import atomic_write
from flowdcn_jax.models import parameter_count, random_params
from flowdcn_jax.precision import compute_dtype
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import abstract_state, initial_state
from pallas_kernels.timing import median_ms, none_if_out_of_memory

_MEAN_FLOW = {"flow.objective": "mean_flow", "model.second_time": True}
# The passes that are a training step, and what each sets beside a model's config.
STEPS = {
    "train": {},
    "mean_flow": _MEAN_FLOW,
    "mean_flow_guided": _MEAN_FLOW
    | {
        "flow.mean_flow.guidance_omega": 0.2,
        "flow.mean_flow.guidance_kappa": 0.92,
        "sampling.guidance": 1.0,
    },
}
PASSES = (*STEPS, "forward")

_MODELS = flags.DEFINE_list("models", ["xl2", "sit_xl2"], "Configs of configs/.")
_SIZES = flags.DEFINE_list(
    "sizes",
    ["256x64", "512x16", "1024x4", "2048x1"],
    "Side of the images in pixels, x, images a device.",
)
_PASSES = flags.DEFINE_list("passes", ["train", "forward"], f"Of {', '.join(PASSES)}.")
_MESHES = flags.DEFINE_list(
    "meshes", ["1x1"], "Of training: data x fsdp, the first local devices of which are used."
)
_RUNS = flags.DEFINE_integer("runs", 5, "Runs of each, of which the median counts.", 1)
_STEPS = flags.DEFINE_integer("steps", 10, "Steps of a run; one run more warms up.", 1)
_OUT = command.define_path("out", "JSON file to write, and beside it a picture.")

_COLUMNS = (
    "pass | image | model | parameters (M) | data x fsdp | batch a device | ms | images/s | GiB | "
    "of the first | of its train"
)


class _Case(NamedTuple):
    """A row of the table."""

    work: str  # one of PASSES
    size: tuple[int, int]  # side of the images, images a device
    shape: tuple[int, int]  # of the mesh: data, fsdp
    model: str
    config: ConfigDict
    mesh: Mesh


def main() -> None:
    out = file_to_write(_OUT)
    cases = _cases()
    report = {"machine": describe_machine(), "results": []}
    with ThreadPoolExecutor() as pool:  # a compilation keeps one core busy, and no more
        compiling = pool.map(functools.partial(none_if_out_of_memory, _compile), cases)
        programs = list(tqdm(compiling, desc="compiling", unit="program", total=len(cases)))
    print(f"| {_COLUMNS} |")
    print("| --- " * (_COLUMNS.count("|") + 1) + "|")
    for case, program in zip(cases, programs, strict=True):
        _add(report["results"], _measure(case, program))
        write_json(out, report)
    if out is not None:
        _plot(report["results"], out.with_suffix(".png"))


def _cases() -> list[_Case]:
    """The rows that the flags ask for.

    Raises:
        UserError: a value that cannot be used.
    """
    if not _PASSES.value or not set(_PASSES.value) <= set(PASSES):
        raise UserError(
            f"--passes is {','.join(_PASSES.value)!r}; expected some of {', '.join(PASSES)}"
        )
    sizes, shapes = _pairs(_SIZES), _pairs(_MESHES)
    cases = []
    for work, size in itertools.product(_PASSES.value, sizes):
        for shape in shapes if work in STEPS else [(1, 1)]:
            mesh = _make_mesh(*shape)
            cases += [
                _Case(work, size, shape, name, _load_config(name, work, size, mesh), mesh)
                for name in _MODELS.value
            ]
    return cases


def _pairs(flag: flags.FlagHolder) -> list[tuple[int, int]]:
    """The values of a list flag such as 256x64.

    Raises:
        UserError: one is not of that form.
    """
    pairs = [text.split("x") for text in flag.value]
    if not pairs or not all(
        len(pair) == 2 and all(number.isdecimal() and int(number) for number in pair)
        for pair in pairs
    ):
        raise UserError(
            f"--{flag.name} is {','.join(flag.value)!r}; expected pairs of positive numbers "
            f"such as {flag.default[0]}, with commas between them"
        )
    return [(int(first), int(second)) for first, second in pairs]


def _make_mesh(data: int, fsdp: int) -> Mesh:
    """Of the first devices of this machine."""
    devices = jax.local_devices()
    if data * fsdp > len(devices):
        raise UserError(
            f"--meshes names {data}x{fsdp}; expected at most {len(devices)} devices, all here"
        )
    return make_mesh(data, fsdp, devices[: data * fsdp])


def _load_config(name: str, work: str, size: tuple[int, int], mesh: Mesh) -> ConfigDict:
    """The config of configs/`name`.py with a pass' keys and the flags' sizes.

    Raises:
        UserError: there is none, or it does not go with them.
    """
    if name not in config_names():
        raise UserError(f"--models names {name!r}; expected some of {', '.join(config_names())}")
    config = load_config(name)
    config.update_from_flattened_dict(STEPS.get(work, {}))
    config.data.aspect_buckets.count = 0
    config.data.image_size, rows = size
    config.train.batch_size = rows * mesh.size
    config.mesh.update(data=mesh.shape["data"], fsdp=mesh.shape["fsdp"])
    validate(config, mesh.size, 1)
    return config


def _compile(case: _Case) -> jax.stages.Compiled:
    compile_pass = compile_step if case.work in STEPS else compile_forward
    return compile_pass(case.config, case.mesh)


def _measure(case: _Case, program: jax.stages.Compiled | None) -> dict[str, Any]:
    """A row of the results; what memory did not suffice for is None."""
    time_pass = _time_step if case.work in STEPS else _time_forward
    step_ms = program and none_if_out_of_memory(time_pass, case.config, case.mesh, program)
    rows = case.config.train.batch_size
    return {
        "pass": case.work,
        "model": case.model,
        "parameters": parameter_count(abstract_state(case.config, case.mesh).params),
        "image_size": case.config.data.image_size,
        "mesh": dict(case.mesh.shape),
        "batch_size": rows // case.mesh.size,
        "dtype": jnp.dtype(compute_dtype(case.config.model.dtype)).name,
        "step_ms": step_ms,
        "images_per_s": step_ms and rows / step_ms * 1e3,
        "program_bytes": program and program_bytes(program),
        "process_peak_bytes": process_peak_bytes(case.mesh.devices.flat),
        "config": case.config.to_dict(),
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


def _time_forward(config: ConfigDict, mesh: Mesh, program: jax.stages.Compiled) -> float:
    """Milliseconds a pass.

    Raises:
        FloatingPointError: the velocity was infinite or NaN.
    """
    shapes = abstract_state(config, mesh).params
    params = jax.device_put(random_params(shapes), jax.tree.map(lambda x: x.sharding, shapes))
    batch = random_batch(config, mesh)
    times = jnp.linspace(0.1, 0.9, config.train.batch_size)

    def run():
        for _ in range(_STEPS.value):
            velocity = program(params, batch["image"], times, batch["label"])
        return velocity

    if not np.isfinite(run()).all():
        raise FloatingPointError("the velocity is not finite")
    return median_ms(run, runs=_RUNS.value) / _STEPS.value


def _add(results: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Adds a row to the results, with what it is of others, and prints it."""
    results.append(row)

    def rate_like(*same: str, **others: str) -> float | None:
        wanted = {key: row[key] for key in ("image_size", "batch_size", "mesh", *same)} | others
        rows = (r for r in results if all(r[key] == value for key, value in wanted.items()))
        return next((r["images_per_s"] for r in rows), None)

    rate, first = row["images_per_s"], rate_like("pass")
    train = rate_like("model", **{"pass": "train"}) if row["pass"] in STEPS else None
    row["of_the_first"] = rate / first if rate and first else None
    row["of_its_train"] = train / rate if rate and train else None
    mesh = row["mesh"]
    cells = [row["pass"], f"{row['image_size']}²", row["model"], f"{row['parameters'] / 1e6:.2f}"]
    cells += [f"{mesh['data']} x {mesh['fsdp']}", str(row["batch_size"])]
    if rate is None:
        cells += ["out of memory", "", "", "", ""]
    else:
        cells += [
            f"{row['step_ms']:.2f}",
            f"{rate:.1f}",
            f"{row['program_bytes'] / 2**30:.2f}",
            f"{row['of_the_first']:.2f}" if first else "",
            f"{row['of_its_train']:.2f}" if train else "",
        ]
    print(f"| {' | '.join(cells)} |", flush=True)


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    """Images/s and memory over the images' size, a line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in results if row["images_per_s"]]
    works = list(dict.fromkeys(row["pass"] for row in shown))
    if not works:
        return
    figure, axes = pyplot.subplots(
        2, len(works), figsize=(4.5 * len(works), 6), sharex=True, squeeze=False, layout="tight"
    )
    for column, work in zip(axes.T, works, strict=True):
        lines = itertools.groupby(
            sorted(
                (row for row in shown if row["pass"] == work),
                key=lambda row: (row["model"], *row["mesh"].values(), row["image_size"]),
            ),
            key=lambda row: (row["model"], *row["mesh"].values()),
        )
        for (model, data, fsdp), rows in lines:
            rows, label = list(rows), model if data * fsdp == 1 else f"{model}, {data} x {fsdp}"
            sides = [row["image_size"] for row in rows]
            column[0].plot(sides, [row["images_per_s"] for row in rows], "o-", label=label)
            column[1].plot(sides, [row["program_bytes"] / 2**30 for row in rows], "o-", label=label)
        column[0].set(title=work, ylabel="images/s", xscale="log", yscale="log")
        column[1].set(xlabel="side of the images, pixels", ylabel="GiB a device", ylim=(0, None))
        sides = sorted({row["image_size"] for row in shown})
        column[1].set_xticks(sides, map(str, sides), minor=False)
        column[1].minorticks_off()
        column[0].legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    command.run(main)
