"""How fast the feature networks of evaluation are, and how much quicker arithmetic moves figures.

    python -m benchmarks.features --out=docs/features.json
    python -m benchmarks.features --networks=dinov2 --precisions=bfloat16 --batch_size=128
    python -m benchmarks.features --images=cifar10 --weights=FOLDER

"on the device" is a batch of uint8 images that lies there already, resized and through the network,
again and again: the median of the runs. "in use" is a call with images in the host's memory and
features back in it, which are checked for numbers. Compilation is left out.

With --images the Fréchet distance of every other image to those in between, whose contrast is
halved, is computed in each precision, and its change against float32. Weights are random and of the
published sizes, but for networks whose NAME.safetensors lies in --weights.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from flowdcn_jax import command
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.evaluation import ImageSet, frechet_distance, load_features, open_images
from flowdcn_jax.evaluation.features import NETWORKS, Description, FeatureExtractor
from flowdcn_jax.evaluation.features.dinov2 import VIT_L, DINOv2
from flowdcn_jax.evaluation.features.efficientnet import EfficientNetLite0
from flowdcn_jax.evaluation.features.extractor import BATCH_SIZE, PRECISIONS
from flowdcn_jax.evaluation.features.inception import Inception
from flowdcn_jax.evaluation.gaussian import Moments
from flowdcn_jax.precision import compute_dtype
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh
from pallas_kernels.timing import median_ms

_CHOICES = {
    "float32": ("float32", False),
    "tf32": ("float32", True),
    "bfloat16": ("bfloat16", False),
}
_BUILD = {
    "inception": Inception,
    "dinov2": partial(DINOv2, VIT_L),
    "efficientnet_lite0": EfficientNetLite0,
}

_NETWORKS = flags.DEFINE_list("networks", list(_BUILD), "Networks, by the names in Python.")
_PRECISIONS = flags.DEFINE_list("precisions", list(_CHOICES), "float32, tf32, bfloat16.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images, pixels.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", BATCH_SIZE, "Images a device at a time.", 1)
_BATCHES = flags.DEFINE_integer("batches", 16, "Batches of the call that is timed.", 1)
_DEVICES = flags.DEFINE_integer("devices", 1, "Local devices to use, the first ones.", 1)
_IMAGES = flags.DEFINE_string(
    "images", None, "Images to measure a distance with, as evaluate.py takes them."
)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 10_000, "Images of the distance, at most.", 4)
_WEIGHTS = flags.DEFINE_string("weights", None, "Folder of NAME.safetensors.")
_RUNS = flags.DEFINE_integer("runs", 9, "Runs of a batch, of which the median counts.", 1)
_OUT = command.define_path("out", "JSON file to write.")

_COLUMNS = (
    "network | precision | image | batch | devices | images/s on the device | in use | distance | "
    "change"
)


def main() -> None:
    out = file_to_write(_OUT)
    for flag, choices in ((_NETWORKS, _BUILD), (_PRECISIONS, _CHOICES)):
        for name in flag.value:
            if name not in choices:
                raise UserError(
                    f"--{flag.name} names {name!r}; expected some of {', '.join(choices)}"
                )
    devices = jax.local_devices()
    if _DEVICES.value > len(devices):
        raise UserError(f"--devices is {_DEVICES.value}; expected at most {len(devices)}, all here")
    mesh = make_mesh(devices=devices[: _DEVICES.value])
    report = {"machine": describe_machine(), "results": []}
    print(f"| {_COLUMNS} |")
    print("| --- " * (_COLUMNS.count("|") + 1) + "|")
    halves = _halves(open_images(_IMAGES.value)) if _IMAGES.value else ()
    for name in _NETWORKS.value:
        distances = []
        for precision in _PRECISIONS.value:
            extractor = _extractor(name, precision, mesh)
            row = _measure(extractor, mesh)
            report["results"].append(row)
            cells = [name, precision, row["image_size"], row["batch_size"], row["num_devices"]]
            cells += [f"{row[key]:.1f}" for key in ("images_per_s", "images_per_s_in_use")]
            if halves:
                distances.append(_distance(halves, extractor))
                row |= {"num_images": len(halves[0]), "distance": distances[-1]}
                row["change"] = distances[-1] / distances[0] - 1  # against the first precision
                cells += [f"{row['distance']:.6g}", f"{row['change']:+.1e}"]
            else:
                cells += ["", ""]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    write_json(out, report)


def random_extractor(
    name: str, dtype: str, fast: bool, *, batch_size: int, mesh: Mesh
) -> FeatureExtractor:
    """A network with random weights, of a size that brings images through to the end."""
    build = partial(_BUILD[name], dtype=compute_dtype(dtype))
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    generator = np.random.default_rng(0)

    def draw(path: tuple, leaf: Any) -> np.ndarray:
        if path[-1].key in ("bias", "mean"):
            return np.zeros(leaf.shape, np.float32)
        if len(leaf.shape) == 1:  # what norms and blocks multiply by
            return np.ones(leaf.shape, np.float32)
        deviation = math.sqrt(2 / math.prod(leaf.shape[:-1]))
        return np.float32(deviation) * generator.standard_normal(leaf.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(shapes))
    preprocessing, (products, precision) = (
        NETWORKS[name].preprocessing["adm"],
        PRECISIONS[dtype, fast],
    )
    description = Description(
        network=name,
        protocol="adm",
        preprocessing=preprocessing.in_words(),
        outputs=NETWORKS[name].outputs,
        precision=precision,
        weights_sha256=None,
    )
    options = dict(products=products, batch_size=batch_size, mesh=mesh)
    return FeatureExtractor(graphdef, params, description, preprocessing, **options)


def _extractor(name: str, precision: str, mesh: Mesh) -> FeatureExtractor:
    """A network with the weights of a file, if there is one, or with random ones."""
    dtype, fast = _CHOICES[precision]
    options = dict(batch_size=_BATCH_SIZE.value, mesh=mesh)
    if _WEIGHTS.value and Path(_WEIGHTS.value, f"{name}.safetensors").is_file():
        return load_features(name, weights=_WEIGHTS.value, dtype=dtype, fast=fast, **options)
    return random_extractor(name, dtype, fast, **options)


def _halves(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n,H,W,3]: every other image, and those in between with half of the contrast."""
    (pixels,) = images.read([range(min(images.count, _NUM_IMAGES.value))])
    return pixels[::2], pixels[1::2] // 2 + 64


def _distance(halves: tuple[np.ndarray, np.ndarray], extractor: FeatureExtractor) -> float:
    gaussians = []
    for images in halves:
        moments = Moments(extractor.num_features)
        moments.add(extractor(images)["features"])
        gaussians.append(moments.gaussian())
    return frechet_distance(*gaussians)


def _measure(extractor: FeatureExtractor, mesh: Mesh) -> dict[str, Any]:
    """A row of the results."""
    shape = (extractor.batch_size, _IMAGE_SIZE.value, _IMAGE_SIZE.value, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batch_ms = median_ms(
        extractor.compute, jax.device_put(images, batch_sharding(mesh)), runs=_RUNS.value
    )
    many = np.concatenate([images] * _BATCHES.value)
    start_s = time.perf_counter()
    features = extractor(many)["features"]
    call_s = time.perf_counter() - start_s
    assert features.std() > 0, "nothing comes through the network"
    return extractor.description._asdict() | {
        "image_size": _IMAGE_SIZE.value,
        "batch_size": _BATCH_SIZE.value,
        "num_devices": mesh.size,
        "batch_ms": batch_ms,
        "images_per_s": extractor.batch_size / batch_ms * 1e3,
        "images_per_s_in_use": len(many) / call_s,
    }


if __name__ == "__main__":
    command.run(main)
