"""A run small enough for a test: digits, a two-group model, a few steps."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

from flowdcn_jax.config import load_config, model_config
from flowdcn_jax.evaluation import evaluator
from flowdcn_jax.runs import items
from flowdcn_jax.sampling import grid_drawer
from flowdcn_jax.training import loop
from tests import forked

REPOSITORY = Path(__file__).parent.parent

OVERRIDES = {
    "model.width": 16,
    "model.depth": 1,
    "model.num_groups": 2,
    "model.dtype": "float32",
    "model.patch_size": 2,
    "data.image_size": 8,
    "train.batch_size": 16,
    "train.num_steps": 6,
    "optimizer.warmup_steps": 2,
    "checkpoint.every_steps": 2,
    "log.every_steps": 1,
    "log.sample_every_steps": 0,
    "sampling.num_images": 4,
    "sampling.num_steps": 2,
}

# config.model of the other models, of the same size.
_SMALL = dict(width=16, depth=1, in_channels=1, num_classes=10, dtype="float32")
SIT = model_config("sit") | _SMALL | dict(num_heads=2)
FLOWCNN = model_config("flowcnn") | _SMALL | dict(num_groups=2)


def config(**overrides):
    """The tiny config; keys such as model__width=32 override config.model.width."""
    result = load_config("digits")
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    for key, value in (OVERRIDES | dotted).items():
        *sections, name = key.split(".")
        node = result
        for section in sections:
            node = node[section]
        node[name] = value
    return result


def train(
    config, workdir, *, one_device: bool = True, make_grid_drawer=grid_drawer, **options
) -> bool:
    """Trains in this process, on one of its virtual devices or on all of them."""
    devices = jax.devices()[:1] if one_device else None
    return loop.train(config, str(workdir), make_grid_drawer, evaluator, devices=devices, **options)


def manifest(name="sd_vae", *, scale=0.18215, shift=0.0, weights_sha256=None, **settings):
    """What metadata.json must say of latents."""
    encoder = dict(name=name, weights_sha256=weights_sha256, scale=scale, shift=shift)
    return {"settings": {"autoencoder": encoder, **settings}}


def train_command(workdir, *extra: str, **overrides) -> list[str]:
    """train.py on the tiny config."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in (OVERRIDES | dotted).items()]
    base = [sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={workdir}"]
    return [*base, *flags, *extra]


def start(command: list[str], num_devices: int = 1) -> subprocess.Popen:
    """Starts a command of the project in its folder, with virtual CPU devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, timeout_s: float = 240) -> tuple[int, str]:
    """(exit code, everything printed)."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, output


def free_port() -> int:
    """A port for the processes of a run to meet at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command: list[str], num_devices: int = 1, timeout_s: float = 240) -> tuple[int, str]:
    """(exit code, everything printed) of a command that begins with the interpreter."""
    assert command[0] == sys.executable
    return forked.run(command[1:], num_devices=num_devices, timeout_s=timeout_s)


def metrics(workdir) -> list[dict]:
    """The lines of a run's metrics file."""
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").open()]


def numbers(workdir) -> list[tuple]:
    """What must not depend on interruptions: a run's losses and gradient norms, by step."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(workdir)]


def files(workdir) -> dict[Path, int]:
    """When each file of a run was last written, but for its lock."""
    files = (path for path in Path(workdir).rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.stat().st_mtime_ns for path in files}


def steps(workdir) -> list[int]:
    """The finished checkpoints of a run."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def rewrite_run(workdir, step: int, change) -> None:
    """Makes a checkpoint one that was saved with another record of its run.

    `change` alters the record {"config": ..., ...} in place.
    """
    folder = Path(workdir) / "checkpoints" / str(step)
    record = json.loads((folder / "run" / "metadata").read_text())
    change(record)
    (folder / "run" / "metadata").write_text(json.dumps(record))
    sums = checksums(workdir, step) | {"run": items.text_checksum(record)}
    (folder / "checksums" / "metadata").write_text(json.dumps(sums))


def checksums(workdir, step: int) -> dict:
    """The checksums of every array of a checkpoint."""
    text = (Path(workdir) / "checkpoints" / str(step) / "checksums" / "metadata").read_text()
    return json.loads(text)
