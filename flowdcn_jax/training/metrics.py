"""What a run reports: a JSON-lines file, TensorBoard, a progress bar, W&B; and its speed."""

import contextlib
import importlib.util
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from flowdcn_jax.data import buckets_of
from flowdcn_jax.errors import ConfigError, UserError
from flowdcn_jax.files import atomic_write, naming
from flowdcn_jax.models import forward_macs
from flowdcn_jax.training.objective import make_objective

METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb_run_id"  # in a workdir: a run that goes on is one run there too
PROFILE_FOLDER = "profile"
UNPROFILED_STEPS = 3  # of a run, before a trace begins: they are slower than the others

# Dense bfloat16 peak of one chip, FLOP/s, from its maker's data sheet.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


class NonFiniteError(UserError, RuntimeError):
    """The loss or the gradient became infinite or NaN; the message says where and what to do."""


def check_finite(rows: list[tuple[int, dict]]) -> list[dict]:
    """The metrics of (step, metrics) rows, in the host's memory.

    Raises:
        NonFiniteError: at the first step whose loss or gradient is not finite.
    """
    for step, metrics in rows:
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
            raise NonFiniteError(
                f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, "
                f"learning rate {metrics['learning_rate']:.3g}. Checkpoints are all from before "
                "it. Go on from the newest with a lower --config.optimizer.learning_rate or with "
                "--config.optimizer.clip_norm=1; --config.model.dtype=float32 tells whether "
                "bfloat16 is the cause"
            )
    return [metrics for _, metrics in rows]


def check_wandb(config) -> None:
    """Raises ConfigError if `config` (config.log) asks for Weights & Biases and it is not there."""
    if config.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"config.log.wandb_project is {config.wandb_project!r}, and the package wandb is not "
            "installed: pip install wandb, or leave the key out"
        )


def train_flops_per_image(config, source) -> float:
    """FLOPs of the model's products in a training step, an image, averaged over a data set."""
    macs = sum(
        len(bucket) / len(source) * forward_macs(config.model, *bucket.image_shape[:2])
        for bucket in buckets_of(source)
    )
    return make_objective(config).forward_passes * 2 * macs  # 2 FLOPs a MAC


def summarise(
    window: list[dict], config, stopwatch: "Stopwatch", flops_per_image: float
) -> dict[str, float]:
    """A line of metrics of the steps since the last: means, and the speed. Restarts the watch."""
    elapsed_s, data_wait = stopwatch.restart()
    images_per_s = len(window) * config.train.batch_size / elapsed_s
    summary = {
        "loss": float(np.mean([metrics["loss"] for metrics in window])),
        "grad_norm": float(np.mean([metrics["grad_norm"] for metrics in window])),
        "learning_rate": float(window[-1]["learning_rate"]),
        "images_per_s": images_per_s,
        "data_wait": data_wait,
    }
    for name in window[0].keys() - summary.keys():  # what the objective adds
        summary[name] = float(np.mean([metrics[name] for metrics in window]))
    utilisation = model_flops_utilisation(images_per_s, flops_per_image)
    if utilisation is not None:
        summary["model_flops_utilisation"] = utilisation
    return summary


def model_flops_utilisation(images_per_s: float, train_flops_per_image: float) -> float | None:
    """The share of all devices' peak that the model's own arithmetic takes; None: peak unknown."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    if peak is None:
        return None
    return images_per_s * train_flops_per_image / (peak * jax.device_count())


class MetricWriter:
    """Writes metrics and grids under the workdir; does nothing on processes other than the first.

    A run that resumes at `start_step` first drops the lines of later steps, which it will write
    again.
    """

    def __init__(self, workdir: Path, config, *, start_step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        num_steps = config.train.num_steps
        workdir.mkdir(parents=True, exist_ok=True)
        drop_later_lines(workdir / METRICS_FILE, start_step)
        self._file = (workdir / METRICS_FILE).open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._wandb = _start_wandb(workdir, config)
        self._bar = tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        if self._active:
            self._bar.update()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a line, and shows the most telling numbers beside the bar."""
        if not self._active:
            return
        with naming(self._file.name):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, {metrics['images_per_s']:.0f} images/s"
        )

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Sends a uint8 [H,W,3] picture to TensorBoard."""
        if self._active:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
            self._tensorboard.flush()
            if self._wandb is not None:
                import wandb

                self._wandb.log({name: wandb.Image(image)}, step=step)

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._active:
            self._bar.write(text)

    def close(self) -> None:
        if self._active:
            self._bar.close()
            with naming(self._file.name):
                self._file.close()
            self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()


def _start_wandb(workdir: Path, config) -> Any | None:
    """The run at Weights & Biases, which goes on with the one of this workdir; None: not asked."""
    if config.log.wandb_project is None:
        return None
    import wandb  # an extra: `check_wandb` has found it

    identifier = workdir / WANDB_FILE
    if not identifier.exists():
        with atomic_write(identifier) as file:
            file.write(uuid.uuid4().hex.encode())
    return wandb.init(
        project=config.log.wandb_project,
        name=workdir.name,
        id=identifier.read_text(),
        resume="allow",
        dir=str(workdir),
        config=json.loads(config.to_json()),
    )


class Profiler:
    """Writes a trace of `num_steps` steps to WORKDIR/profile, once a run is warm; 0: none.

    TensorBoard's profile plugin and xprof show it.
    """

    def __init__(self, workdir: Path, *, start_step: int, num_steps: int):
        self._target = workdir / PROFILE_FOLDER
        self._first = start_step + UNPROFILED_STEPS
        self._last = self._first + num_steps
        self._tracing = False

    def after(self, step: int, state: Any) -> str | None:
        """Begins and ends the trace where it is due; returns a message once it is written."""
        if self._first == step < self._last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._target))
            self._tracing = True
        elif self._tracing and step == self._last:
            jax.block_until_ready(state)
            self.close()
            return f"wrote a trace of {self._last - self._first} steps to {self._target}"
        return None

    def close(self) -> None:
        """Ends a trace whose steps did not come to their end."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def drop_later_lines(path: Path, last_step: int) -> None:
    """Keeps the whole lines of a metrics file up to `last_step`; replaces the file in one go."""
    if not path.exists():
        return
    lines = _lines(path)
    kept = [line for line in lines if (row := _row(line)) and row["step"] <= last_step]
    if kept != lines:
        with atomic_write(path) as file:
            file.write("".join(kept).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; the run may be writing, and a crash can leave anything."""
    return [row for line in _lines(path) if (row := _row(line))]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith("\n") and isinstance(row, dict) and type(row.get("step")) is int
    return row if whole else None


class Stopwatch:
    """Wall time between logging steps, less what is not training, and the share spent on data."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._paused_s = 0.0
        self._data_wait_s = 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """The time of the block does not count (grids, checkpoints)."""
        start = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """The time of the block counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._data_wait_s += time.perf_counter() - start

    def restart(self) -> tuple[float, float]:
        """(seconds of training, share of them spent waiting for data) since the last restart."""
        elapsed_s = time.perf_counter() - self._start - self._paused_s
        share = self._data_wait_s / elapsed_s
        self._reset()
        return elapsed_s, share
