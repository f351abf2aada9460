"""How fast cached latents are read: examples a second by threads and batch size.

    python -m benchmarks.reader --out=docs/reader.json

Random latents are written into a temporary folder, and read back as training reads them: shuffled,
flipped, drawn with their noise and batched.  The files stay in the page cache, so the disk is not
measured.  Of several runs the best counts, since other programs can only slow it down; CPU time
hardly depends on them.
"""

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.random_latents import reader_rate, write_random_latents
from flowdcn_jax import command
from flowdcn_jax.autoencoders import PUBLISHED_DOWNSAMPLING
from flowdcn_jax.command import file_to_write, numbers, write_json
from flowdcn_jax.config import default_config
from flowdcn_jax.data import make_source
from flowdcn_jax.environment import describe_machine

_SIZES = flags.DEFINE_list("image_sizes", ["256", "512"], "Of latents an eighth of it, 4 channels.")
_THREADS = flags.DEFINE_list("threads", ["1", "2", "4"], "Reader threads.")
_BATCHES = flags.DEFINE_list("batch_sizes", ["32", "256"], "Examples a batch.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Runs of each, of which the best counts.", 1)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "Length of a run.", 0)
_MEGABYTES = flags.DEFINE_integer("megabytes", 200, "Latents of each size.", 1)
_OUT = command.define_path("out", "JSON file to write.")


def main() -> None:
    out, sizes = file_to_write(_OUT), numbers(_SIZES)
    all_threads, batches = numbers(_THREADS, at_least=0), numbers(_BATCHES)
    report = {"machine": describe_machine(), "results": []}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            side = size // PUBLISHED_DOWNSAMPLING
            write_random_latents(Path(folder), shape=(side, side, 4), megabytes=_MEGABYTES.value)
        cases = itertools.product(sizes, all_threads, batches)
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
    write_json(out, report)


def _measure(size: int, threads: int, batch_size: int, folder: Path) -> dict[str, Any]:
    """The best of the runs."""
    section = default_config().data
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
    command.run(main)
