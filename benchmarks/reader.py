"""How fast cached latents are read: examples a second by threads and batch size.

    python -m benchmarks.reader --out=docs/reader.json

Random latents are written into a temporary folder, and read back as training reads them: shuffled,
flipped, drawn with their noise and batched.  The files stay in the page cache, so the disk is not
measured.  Of several runs the best counts, since other programs can only slow it down; CPU time
hardly depends on them.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from benchmarks.machine import describe_machine
from benchmarks.random_latents import reader_rate, write_random_latents
from configs import default
from flowdcn_jax.data import make_source
from flowdcn_jax.files import atomic_write

_SIZES = flags.DEFINE_list("image_sizes", ["256", "512"], "Of latents an eighth of it, 4 channels.")
_THREADS = flags.DEFINE_list("threads", ["1", "2", "4"], "Reader threads.")
_BATCHES = flags.DEFINE_list("batch_sizes", ["32", "256"], "Examples a batch.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Runs of each, of which the best counts.", 1)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "Length of a run.", 0)
_MEGABYTES = flags.DEFINE_integer("megabytes", 200, "Latents of each size.", 1)
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    report = {
        "machine": describe_machine(),
        "results": [],
    }
    sizes = [int(size) for size in _SIZES.value]
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            shape = (size // 8, size // 8, 4)
            write_random_latents(Path(folder), shape=shape, megabytes=_MEGABYTES.value)
        cases = itertools.product(sizes, map(int, _THREADS.value), map(int, _BATCHES.value))
        print("| latents | threads | batch | examples/s | CPU us/example |")
        print("| --- | --- | --- | --- | --- |")
        for size, threads, batch in cases:
            result = _measure(size, threads, batch, Path(folder))
            report["results"].append(result)
            print(
                f"| {result['latents']} | {threads} | {batch} | {result['examples_per_s']:.0f} | "
                f"{result['cpu_us_per_example']:.0f} |",
                flush=True,
            )
    report["load_average_after"] = os.getloadavg()[0]
    if _OUT.value:
        with atomic_write(Path(_OUT.value)) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())


def _measure(size: int, threads: int, batch_size: int, folder: Path) -> dict[str, Any]:
    """The best of the runs."""
    section = default.get_config().data
    section.update(data_dir=str(folder), image_size=size, random_flip=True)
    source = make_source(section)
    runs = [
        reader_rate(
            source,
            batch_size=batch_size,
            num_threads=threads,
            prefetch_batches=section.prefetch_batches,
            seconds=_SECONDS.value,
            seed=seed,
        )
        for seed in range(_REPEATS.value)
    ]
    return {
        "latents": "x".join(map(str, source.image_shape)),
        "threads": threads,
        "batch_size": batch_size,
        "examples_per_s": max(run.examples_per_s for run in runs),
        "cpu_us_per_example": min(run.cpu_us_per_example for run in runs),
        "runs_examples_per_s": [run.examples_per_s for run in runs],
    }


if __name__ == "__main__":
    app.run(main)
