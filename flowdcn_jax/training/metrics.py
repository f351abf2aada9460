"""What a run reports: a JSON-lines file, TensorBoard, and a progress bar; and its speed."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from flowdcn_jax.files import atomic_write

METRICS_FILE = "metrics.jsonl"

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

    def __init__(self, workdir: Path, *, start_step: int, num_steps: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        drop_later_lines(workdir / METRICS_FILE, start_step)
        self._file = (workdir / METRICS_FILE).open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        if self._active:
            self._bar.update()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a line, and shows the most telling numbers beside the bar."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, {metrics['images_per_s']:.0f} images/s"
        )

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Sends a uint8 [H,W,3] picture to TensorBoard."""
        if self._active:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
            self._tensorboard.flush()

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._active:
            self._bar.write(text)

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._file.close()
            self._tensorboard.close()


def drop_later_lines(path: Path, last_step: int) -> None:
    """Keeps the whole lines of a metrics file up to `last_step`; replaces the file in one go."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_whole_and_not_after(line, last_step)]
    if kept != lines:
        with atomic_write(path) as file:
            file.write("".join(kept).encode())


def _is_whole_and_not_after(line: str, last_step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= last_step
    except ValueError:  # a crash can leave anything at the end of a file
        return False


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
