"""What an evaluation takes beside its network: seconds of each part, and memory of a whole pass.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --parts=precision_recall --num_images=50000   # on a GPU

Features are random, 2048 (and 2023 spatial ones, 1008 logits) as Inception's.  `pass` writes an
.npz file of 256x256 images and runs `collect` over it with a network that only copies pixels.  CPU
seconds count all threads; other programs lengthen the others.  The peak is that of the process:
measure `pass` alone for it.
"""

import collections
import resource
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from flowdcn_jax import command
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.evaluation import (
    collect,
    frechet_distance,
    kernel_distance,
    open_images,
    precision_recall,
)
from flowdcn_jax.evaluation.gaussian import Gaussian, Moments
from flowdcn_jax.evaluation.inception_score import SPLITS, InceptionScore

_IMAGES = flags.DEFINE_integer("num_images", 50_000, "Images of each side.", 4)
_FEATURES = flags.DEFINE_integer("num_features", 2048, "Features of an image.", 2)
_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images of `pass`, pixels.", 1)
_PARTS = flags.DEFINE_list(
    "parts", ["statistics", "distance", "score", "kid"], "Also precision_recall and pass."
)
_OUT = command.define_path("out", "JSON file to write.")

_BATCH = 64
_CLASSES, _SPATIAL = 1008, 2023


def main() -> None:
    out = file_to_write(_OUT)
    unknown = [part for part in _PARTS.value if part not in PARTS]
    if unknown:
        raise UserError(f"--parts has {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    results = []
    print("| part | images | seconds | CPU seconds | peak MB |")
    print("| --- | --- | --- | --- | --- |")
    for part in _PARTS.value:
        work = PARTS[part]()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        result = {
            "part": part,
            "num_images": _IMAGES.value,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        }
        results.append(result)
        seconds = f"{result['seconds']:.1f} | {result['cpu_seconds']:.1f}"
        print(f"| {part} | {_IMAGES.value} | {seconds} | {result['peak_mb']:.0f} |", flush=True)
    write_json(out, {"machine": describe_machine(), "results": results})


def _rows(seed: int, num_columns: int | None = None) -> np.ndarray:
    """float32 [N,D], spread as Inception's features are: many small ones, none below 0."""
    random = np.random.default_rng(seed)
    shape = (_IMAGES.value, num_columns or _FEATURES.value)
    return random.standard_gamma(0.5, shape, np.float32)


def _statistics() -> Callable[[], Any]:
    rows, moments = _rows(0), Moments(_FEATURES.value)

    def work() -> Gaussian:
        for start in range(0, len(rows), _BATCH):
            moments.add(rows[start : start + _BATCH])
        return moments.gaussian()

    return work


def _distance() -> Callable[[], Any]:
    rows = np.random.default_rng(0).standard_normal((2, 2 * _FEATURES.value, _FEATURES.value))
    first, second = (Gaussian(each.mean(0), np.cov(each, rowvar=False)) for each in rows)
    return lambda: frechet_distance(first, second)


def _score() -> Callable[[], Any]:
    logits, score = _rows(0, _CLASSES), InceptionScore(SPLITS["adm"](_IMAGES.value))

    def work() -> np.ndarray:
        for start in range(0, len(logits), _BATCH):
            score.add(logits[start : start + _BATCH])
        return score.scores()

    return work


def _precision_recall() -> Callable[[], Any]:
    first, second = _rows(0), _rows(1)
    return lambda: precision_recall(first, second)


def _kernel_distance() -> Callable[[], Any]:
    first, second = _rows(0), _rows(1)
    size = min(1000, _IMAGES.value)
    return lambda: kernel_distance(first, second, subset_size=size)


class _Pixels:
    """Stands in for Inception: its outputs are pixels."""

    description = collections.namedtuple("Description", "protocol")("adm")
    num_features = 2048
    batch_size = _BATCH

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        pixels = images.reshape(len(images), -1)
        sizes = {"features": self.num_features, "spatial": _SPATIAL, "logits": _CLASSES}
        return {name: pixels[:, :n].astype(np.float32) for name, n in sizes.items()}


def _pass() -> Callable[[], Any]:
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "samples.npz"
    shape = (_IMAGES.value, _SIZE.value, _SIZE.value, 3)
    noise = np.random.default_rng(0).integers(0, 256, (3 * _SIZE.value,), np.uint8)
    image = np.broadcast_to(noise.reshape(-1, 3), shape[1:]).copy()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(len(noise)):  # one after the other gives way to another
                image[0, 0, 0] = index % 256
                count = len(range(index, _IMAGES.value, len(noise)))
                file.write(image.tobytes() * count)

    def work() -> None:
        with folder:
            collect(open_images(str(path)), _Pixels())

    return work


PARTS = {
    "statistics": _statistics,
    "distance": _distance,
    "score": _score,
    "kid": _kernel_distance,
    "precision_recall": _precision_recall,
    "pass": _pass,
}

if __name__ == "__main__":
    command.run(main)
