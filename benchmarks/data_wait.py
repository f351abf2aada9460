"""Whether a training step waits for data, with the demand of eight GPUs on one machine's reader.

    python -m benchmarks.data_wait --out=docs/data_wait.json
    python -m benchmarks.data_wait --step_ms=300   # without a GPU: a sleep stands in for the step

Runs the training step of --config (XL/2) on one GPU.  For each step the reader draws the batches of
--gpus GPUs, as the one process of such a machine does; one GPU's rows are trained on, the others
are dropped.  As in training, the next batch is fetched and put on the GPU while the step runs; the
wait is the time from a step's end until that is done, and the share is its share of all time.  If
the batch does not fit the GPU, give a smaller --batch_size.

The latents are random and stay in the page cache: the disk is not measured.  Copying to the other
GPUs is not, either.
"""

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import trange

from benchmarks.random_latents import reader_rate, write_random_latents
from benchmarks.steps import Step, stand_in, training_step
from flowdcn_jax import command, config_flag, data
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.config import validate
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.training.inputs import DEVICE_PREFETCH, on_devices
from flowdcn_jax.training.metrics import Stopwatch

_CONFIG = config_flag.define_config_flag(default="configs/xl2.py")
_GPUS = flags.DEFINE_integer("gpus", 8, "GPUs whose demand the reader meets.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images a GPU and step.", 1)
_STEP_MS = flags.DEFINE_float("step_ms", None, "Sleep so long in place of the training step.", 0)
_STEPS = flags.DEFINE_integer("steps", 100, "Steps that count.", 1)
_WARM_UP = flags.DEFINE_integer("warm_up", 20, "Steps before them.", 1)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "How long the reader's own rate is measured.", 0)
_MEGABYTES = flags.DEFINE_integer("megabytes", 400, "Latents to write.", 1)
_OUT = command.define_path("out", "JSON file to write.")


def main() -> None:
    config, out = _check_flags(), file_to_write(_OUT)
    mesh = make_mesh(devices=jax.devices()[:1])
    simulated = _STEP_MS.value is not None
    if simulated:
        print(f"The step is simulated: a sleep of {_STEP_MS.value:g} ms stands in for training.")
    with tempfile.TemporaryDirectory() as folder:
        side = config.data.image_size // config.autoencoder.downsampling
        shape = (side, side, config.model.in_channels)
        write_random_latents(Path(folder), shape=shape, megabytes=_MEGABYTES.value)
        config.data.data_dir = folder
        source = data.make_source(config.data, channels=config.model.in_channels)
        run_step = stand_in(_STEP_MS.value / 1e3) if simulated else training_step(config, mesh)
        result = _measure(config, source, run_step, mesh)
    _print(result)
    report = {
        "machine": describe_machine(),
        "config": flags.FLAGS["config"].config_filename,
        "simulated_step_ms": _STEP_MS.value,  # None: the step was training's
        "gpus": _GPUS.value,
        "batch_size_a_gpu": _BATCH_SIZE.value,
        "latents": "x".join(map(str, shape)),
        "num_threads": config.data.num_threads,
        "prefetch_batches": config.data.prefetch_batches + DEVICE_PREFETCH,
        "result": result,
    }
    write_json(out, report)


def _check_flags() -> ConfigDict:
    """The config of one GPU.

    Raises:
        UserError: a value that cannot be used, or no GPU to run the step on.
    """
    config = _CONFIG.value.copy_and_resolve_references()
    config.autoencoder.name = "preview"
    config.train.batch_size = _BATCH_SIZE.value
    validate(config, 1, 1)
    if _STEP_MS.value is None and jax.devices()[0].platform == "cpu":
        raise UserError(
            "the training step needs a GPU, and there is none; with --step_ms=300 a sleep of "
            "300 ms takes its place"
        )
    return config


def _measure(
    config: ConfigDict, source: data.DataSource, run_step: Step, mesh: Mesh
) -> dict[str, Any]:
    """Times of the steps and of the waits between them, and the rates of demand and reader."""
    options = dict(
        batch_size=_GPUS.value * _BATCH_SIZE.value,
        num_threads=config.data.num_threads,
        prefetch_batches=config.data.prefetch_batches,
        seed=config.seed,
    )
    stream = data.make_batches(source, **options)
    batches = on_devices(_rows_of_one_gpu(stream), mesh)

    def fetch() -> tuple[dict[str, jax.Array], float]:
        start_s = time.perf_counter()
        return next(batches), time.perf_counter() - start_s

    (batch, _), stopwatch, steps = fetch(), Stopwatch(), []
    progress = trange(_WARM_UP.value + _STEPS.value, desc="steps", unit="step", dynamic_ncols=True)
    with ThreadPoolExecutor(1) as pool:
        for _ in progress:
            fetched = pool.submit(fetch)
            run_step(batch)
            with stopwatch.data_wait():
                batch, fetch_s = fetched.result()
            steps.append((*stopwatch.restart(), fetch_s))
    stream.close()
    elapsed_s, shares, fetch_s = np.array(steps[_WARM_UP.value :]).T
    elapsed_ms = 1e3 * elapsed_s
    waits_ms = elapsed_ms * shares
    reader = reader_rate(source, seconds=_SECONDS.value, **options)
    return {
        "step_ms": float(np.mean(elapsed_ms - waits_ms)),
        "fetch_ms": 1e3 * float(np.mean(fetch_s)),
        "wait_ms": float(np.mean(waits_ms)),
        "longest_wait_ms": float(np.max(waits_ms)),
        "data_wait": float(np.sum(waits_ms) / np.sum(elapsed_ms)),  # as in metrics.jsonl
        "demand_examples_per_s": options["batch_size"] / float(np.mean(elapsed_ms)) * 1e3,
        "reader_examples_per_s": reader.examples_per_s,
        "steps": len(waits_ms),
    }


def _rows_of_one_gpu(batches: Iterator[data.Batch]) -> Iterator[data.Batch]:
    """The first GPU's rows of each batch; those of the others are dropped."""
    for batch in batches:
        yield {name: array[: _BATCH_SIZE.value] for name, array in batch.items()}


def _print(result: dict[str, Any]) -> None:
    cells = {
        "step ms": f"{result['step_ms']:.1f}",
        "fetch ms": f"{result['fetch_ms']:.1f}",
        "wait ms": f"{result['wait_ms']:.3f}",
        "longest wait ms": f"{result['longest_wait_ms']:.3f}",
        "share": f"{result['data_wait']:.3%}",
        "demand, examples/s": f"{result['demand_examples_per_s']:.0f}",
        "reader alone, examples/s": f"{result['reader_examples_per_s']:.0f}",
    }
    print(f"| {' | '.join(cells)} |")
    print("| --- " * len(cells) + "|")
    print(f"| {' | '.join(cells.values())} |")


if __name__ == "__main__":
    command.run(main)
