"""How train.py scales over the GPUs of a machine: rates, start, checkpoint, restore, by mesh.

    python -m benchmarks.scaling --out=docs/scaling.json                     # all GPUs: ten minutes
    python -m benchmarks.scaling --meshes=1x1,2x1,1x2 --out=scaling.json     # data x fsdp
    python -m benchmarks.scaling --num_steps=2000 --config=configs/s2.py --meshes=8x1,1x1:8 ...

Each row is a run of train.py on random latents, on the first GPUs of the machine, with the same
batch a GPU. All programs are compiled first, side by side, by `--dry_run`, and kept, so that "first
step", from the command on, is what a second start takes. A run is stopped by SIGTERM after
--num_steps steps; "checkpoint" is from then until the state is there as a whole. "restore" is
another start of that run, on the mesh of the row before it, until its first step.

1x1:8 takes the batch of eight GPUs on one, in eight parts; "loss differs by" compares losses of the
same step with those of the first row of the same batch.

"floor" and "ceiling" are images/s that a model of the communication expects: a step of the first
row's rate, with all bytes of `bytes_sent` sent after it, or all hidden behind it, at --gb_per_s, or
at the rate of an all-reduce of 1 GB, measured here.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks.random_latents import write_random_latents
from benchmarks.study.schedule import gpus
from flowdcn_jax import command, config_flag
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.models import abstract_model, parameter_count
from flowdcn_jax.training.metrics import METRICS_FILE, read_rows

_CONFIG = config_flag.define_config_flag(default="configs/xl2.py")
_MESHES = flags.DEFINE_list(
    "meshes", [], "data x fsdp [: parts of a batch]; by default 1, 2, 4 ... GPUs, and fsdp of all."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images a GPU.", 1)
_STEPS = flags.DEFINE_integer("num_steps", 60, "Steps of each run.", 30)
_GB_PER_S = flags.DEFINE_float("gb_per_s", None, "Between GPUs, for the model; else measured.", 0)
_OUT = command.define_path("out", "JSON file to write.")

_LOG_STEPS = 10
_LIMIT_S = 400  # for a run's next lines
_MEGABYTES = 100  # of latents
_COLUMNS = (
    "mesh | images/s | of the first, a GPU | floor | ceiling | data wait | first step, s | "
    "checkpoint, s | restore, s | loss differs by"
)


class Shape(NamedTuple):
    """A mesh, and in how many parts it takes its batch."""

    data: int
    fsdp: int
    parts: int = 1

    @property
    def gpus(self) -> int:
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"{self.data}x{self.fsdp}" + (f":{self.parts}" if self.parts > 1 else "")


def main() -> None:
    out, config = file_to_write(_OUT), _CONFIG.value
    shapes = _shapes(len(gpus()))
    parameters = parameter_count(abstract_model(config.model)[1])
    report = {"machine": describe_machine(), "config": config.to_dict(), "results": []}
    with tempfile.TemporaryDirectory() as folder:
        root, side = Path(folder), config.data.image_size // config.autoencoder.downsampling
        latent = (side, side, config.model.in_channels)
        write_random_latents(root / "latents", shape=latent, megabytes=_MEGABYTES)
        gb_per_s = _GB_PER_S.value or _all_reduce_gb_per_s()
        report |= {"parameters": parameters, "gb_per_s": gb_per_s}
        _compile(shapes, root)
        print(f"| {_COLUMNS} |")
        print("| --- " * (_COLUMNS.count("|") + 1) + "|")
        for before, shape in zip([shapes[-1], *shapes], shapes, strict=False):
            row = _measure(shape, before, root)
            first = (report["results"] or [row])[0]
            row |= expected(row, first, parameters, gb_per_s)
            row["losses_differ_by"] = _differ(row, report["results"])
            report["results"].append(row)
            _print(row, first)
            write_json(out, report)


def bytes_sent(parameters: int, data: int, fsdp: int) -> float:
    """What each device sends in a step, in rings, if nothing that was gathered is kept.

    Float32 gradients are added up over all devices: scattered over fsdp, each part then over data.
    Under fsdp each matrix is gathered in float32 for the forward pass and again for the backward.
    """
    ring = 4 * parameters / fsdp
    over_data = 2 * ring * (data - 1) / data
    over_fsdp = 3 * 4 * parameters * (fsdp - 1) / fsdp
    return over_data + over_fsdp


def expected(
    row: dict[str, Any], first: dict[str, Any], parameters: int, gb_per_s: float | None
) -> dict[str, Any]:
    """{"floor", "ceiling"}: images/s with everything sent after a step's work, and none."""
    work_s = first["batch_size"] / first["images_per_s"] * row["parts"]
    sent_s = 0.0
    if row["gpus"] > 1:
        if not gb_per_s:
            return {"floor": None, "ceiling": row["batch_size"] / work_s}
        sent_s = bytes_sent(parameters, row["data"], row["fsdp"]) / (gb_per_s * 1e9)
    rate = row["batch_size"]
    return {"floor": rate / (work_s + sent_s), "ceiling": rate / max(work_s, sent_s)}


def _shapes(available: int) -> list[Shape]:
    """What --meshes asks for of so many GPUs; without any, CPU devices stand in."""
    if not _MESHES.value:
        if available < 2:
            raise UserError(f"this machine has {available} GPUs; expected two, or --meshes")
        counts = [n for n in (1, 2, 4, 8, 16) if n <= available]
        most = counts[-1]
        both = [Shape(2, most // 2)] if most > 2 else []
        return [*(Shape(n, 1) for n in counts), *both, Shape(1, most)]
    shapes = []
    for text in _MESHES.value:
        mesh, _, parts = text.partition(":")
        numbers = [*mesh.split("x"), *([parts] if parts else [])]
        if len(mesh.split("x")) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
            raise UserError(f"--meshes names {text!r}; expected such as 2x4 or 1x1:8")
        shapes.append(Shape(*map(int, numbers)))
        if available and shapes[-1].gpus > available:
            raise UserError(f"--meshes names {text}; this machine has {available} GPUs")
    return shapes


def _all_reduce_gb_per_s() -> float | None:
    """Bytes that a device sends in a ring over the seconds it takes; None on one device."""
    program = (
        "import jax, jax.numpy as jnp\n"
        "from pallas_kernels.timing import median_ms\n"
        "n = jax.local_device_count()\n"
        "if n > 1:\n"
        "    x = jnp.ones((n, 2**28 if jax.default_backend() == 'gpu' else 2**16), jnp.float32)\n"
        "    add = jax.pmap(lambda x: jax.lax.psum(x, 'all'), 'all')\n"
        "    ms = median_ms(add, x)\n"
        "    print(2 * (n - 1) / n * x[0].nbytes / ms / 1e6)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(None))
    text = done.stdout.strip()
    return float(text.splitlines()[-1]) if done.returncode == 0 and text else None


def _environment(shape: Shape | None) -> dict[str, str]:
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if shape is None:
        return environment
    if found := gpus():
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(found[: shape.gpus])}
    flag = f"--xla_force_host_platform_device_count={shape.gpus}"
    return environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}


def _command(shape: Shape, workdir: Path, num_steps: int, *extra: str) -> list[str]:
    root, rows = workdir.parent, _BATCH_SIZE.value * shape.gpus * shape.parts
    keys = {
        "data.data_dir": root / "latents",
        "train.batch_size": rows,
        "train.accumulation_steps": shape.parts,
        "train.num_steps": num_steps,
        "mesh.data": shape.data,
        "mesh.fsdp": shape.fsdp,
        "log.every_steps": _LOG_STEPS,
        "log.sample_every_steps": 0,
    }
    given = [arg for arg in sys.argv[1:] if arg.startswith("--config")]
    set_here = [f"--config.{key}={value}" for key, value in keys.items()]
    cache = f"--compilation_cache={root / 'compiled'}"
    return [sys.executable, "train.py", f"--workdir={workdir}", cache, *given, *set_here, *extra]


def _start(shape: Shape, workdir: Path, num_steps: int, *extra: str) -> subprocess.Popen:
    if not any(arg.startswith("--config=") for arg in sys.argv):
        extra = ("--config=configs/xl2.py", *extra)
    with workdir.with_suffix(".log").open("ab") as log:
        command = _command(shape, workdir, num_steps, *extra)
        return subprocess.Popen(
            command, env=_environment(shape), stdout=log, stderr=subprocess.STDOUT
        )


def _compile(shapes: list[Shape], root: Path) -> None:
    """All programs at once, which are kept."""
    started = [(_start(s, root / f"dry_{i}", _STEPS.value, "--dry_run"), i)
               for i, s in enumerate(shapes)]  # fmt: skip
    for process, number in started:
        if process.wait() != 0:
            raise _failed(root / f"dry_{number}")


def _failed(workdir: Path) -> UserError:
    tail = workdir.with_suffix(".log").read_text(errors="replace").splitlines()[-1:]
    return UserError(f"train.py ended early: {' '.join(tail)}")


def _measure(shape: Shape, before: Shape, root: Path) -> dict[str, Any]:
    """A row: a run that is stopped, and goes on for a step on the mesh of the row before."""
    workdir = root / f"run_{shape.data}_{shape.fsdp}_{shape.parts}"
    num_steps = 10 * _STEPS.value  # it is stopped before them
    process, first_s = _until(_start(shape, workdir, num_steps), workdir, rows=1)
    _until(process, workdir, rows=_STEPS.value // _LOG_STEPS)
    stopped = time.monotonic()
    process.send_signal(signal.SIGTERM)
    checkpoint_s = None
    while process.poll() is None:
        time.sleep(0.05)
        if checkpoint_s is None and any((workdir / "checkpoints").glob("[0-9]*")):
            checkpoint_s = time.monotonic() - stopped
    if checkpoint_s is None or process.returncode != 75:
        raise _failed(workdir)
    rows = read_rows(workdir / METRICS_FILE)
    restore_s = None
    if before.gpus * before.parts == shape.gpus * shape.parts:  # the batch of a run cannot change
        count = len(rows)
        process, restore_s = _until(_start(before, workdir, num_steps), workdir, rows=count + 1)
        process.kill()
        process.wait()
    timed = rows[2:]
    return {
        **shape._asdict(),
        "gpus": shape.gpus,
        "batch_size": _BATCH_SIZE.value * shape.gpus * shape.parts,
        "images_per_s": statistics.median(row["images_per_s"] for row in timed),
        "data_wait": statistics.median(row["data_wait"] for row in timed),
        "first_line_s": first_s,
        "checkpoint_s": checkpoint_s,
        "restore_s": restore_s,
        "losses": {row["step"]: row["loss"] for row in rows},
    }


def _until(
    process: subprocess.Popen, workdir: Path, *, rows: int
) -> tuple[subprocess.Popen, float]:
    """(process, seconds) until the run has logged so many lines."""
    start = time.monotonic()
    path = workdir / METRICS_FILE
    while not (path.exists() and len(read_rows(path)) >= rows):
        if process.poll() is not None or time.monotonic() - start > _LIMIT_S:
            process.kill()
            raise _failed(workdir)
        time.sleep(0.05)
    return process, time.monotonic() - start


def _differ(row: dict[str, Any], others: list[dict[str, Any]]) -> float | None:
    """The largest relative difference of losses from those of the first row of the same batch."""
    for other in others:
        if other["batch_size"] == row["batch_size"]:
            steps = other["losses"].keys() & row["losses"].keys()
            return max(abs(row["losses"][s] / other["losses"][s] - 1) for s in steps)
    return None


def _print(row: dict[str, Any], first: dict[str, Any]) -> None:
    def seconds(key: str) -> str:
        return "" if row[key] is None else f"{row[key]:.1f}"

    def rate(key: str) -> str:
        return "" if row[key] is None else f"{row[key]:.0f}"

    a_gpu = row["images_per_s"] / row["gpus"] / (first["images_per_s"] / first["gpus"])
    differ = row["losses_differ_by"]
    cells = [
        str(Shape(row["data"], row["fsdp"], row["parts"])),
        f"{row['images_per_s']:.1f}",
        f"{a_gpu:.3f}",
        rate("floor"),
        rate("ceiling"),
        f"{row['data_wait']:.1%}",
        seconds("first_line_s"),
        seconds("checkpoint_s"),
        seconds("restore_s"),
        "" if differ is None else f"{differ:.1e}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    command.run(main)
