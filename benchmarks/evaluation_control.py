"""Whether figures order copies of real images as they must: a control of evaluation itself.

    python -m benchmarks.evaluation_control --features=efficientnet_lite0 --weights=FILE \\
        --out=docs/evaluation_control.json
    python -m benchmarks.evaluation_control ... --num_images=300 --num_references=600   # a CPU

The reference is every other image of the config's data set, CIFAR-10's training images. Of those in
between come the other sets, as many images each: as they are, blurred, noisy, and of fewer classes,
each in three strengths. Fréchet and kernel distance must be above those of the images as they are,
and rise with the strength; precision must fall with noise, recall as classes go. The exit status is
1 if one does not. Beside FILE.json, FILE.png shows the Fréchet distances.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from scipy.ndimage import gaussian_filter

from flowdcn_jax import command, config_flag
from flowdcn_jax.data import make_source
from flowdcn_jax.data.sources import PixelSource
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.evaluation import (
    FeatureChoice,
    ImageSet,
    Statistics,
    collect,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from flowdcn_jax.files import atomic_write
from flowdcn_jax.options import instance_of

_CONFIG = config_flag.define_config_flag(default="configs/cifar10_s2.py")
_IMAGES = flags.DEFINE_integer("num_images", 5_000, "Images of each set.", 10)
_REFERENCES = flags.DEFINE_integer("num_references", 25_000, "Images of the reference.", 10)
_OUT = flags.DEFINE_string("out", None, "FILE.json to write, and FILE.png.")
_CHOICE = command.option_flags(FeatureChoice)

_AS_THEY_ARE = "as they are"
# By kind: strengths, rising, and their unit.
_STRENGTHS = {
    "blurred": ((0.5, 1.0, 2.0), "standard deviation of the blur, pixels"),
    "noisy": ((8, 16, 32), "standard deviation of the noise, of 255"),
    "fewer classes": ((0.2, 0.5, 0.8), "share of the classes that are missing"),
}
# What must become larger (1) or smaller (-1) with the strength.
_MUST = {
    "blurred": {"distance": 1, "kernel_distance": 1},
    "noisy": {"distance": 1, "kernel_distance": 1, "precision": -1},
    "fewer classes": {"distance": 1, "kernel_distance": 1, "recall": -1},
}


def main() -> int:
    out = command.file_to_write(_OUT)
    features = instance_of(FeatureChoice, _CHOICE()).load()
    source = make_source(_CONFIG.value.data, channels=_CONFIG.value.model.in_channels)
    _check(source)
    positions = np.arange(0, 2 * _REFERENCES.value, 2)
    reference = collect(_image_set("reference", source.images[positions]), features)
    results = []
    print("| images | strength | Fréchet distance | KID | precision | recall |")
    print("| --- " * 6 + "|")
    for kind, strength, images in _sets(source):
        samples = collect(_image_set(f"{kind} {strength:g}", images), features, title=kind)
        row = {"kind": kind, "strength": strength} | _figures(samples, reference)
        results.append(row)
        cells = [kind, f"{strength:g}", *(f"{value:.4g}" for value in list(row.values())[2:])]
        print(f"| {' | '.join(cells)} |", flush=True)
    wrong = _out_of_order(results)
    print("\n".join(wrong) or "All in the order that they must have.")
    report = {
        "num_images": _IMAGES.value,
        "num_references": _REFERENCES.value,
        "network": samples.network,
        "results": results,
        "out_of_order": wrong,
        "machine": describe_machine(),
    }
    command.write_json(out, report)
    if out is not None:
        _plot(results, out.with_suffix(".png"))
    return 1 if wrong else 0


def _check(source: Any) -> None:
    """Raises UserError unless the data set has images enough for all sets."""
    if not isinstance(source, PixelSource):
        raise UserError(f"config.data.name is {_CONFIG.value.data.name!r}; expected pixels")
    if len(source) < 2 * max(_REFERENCES.value, _IMAGES.value):
        raise UserError(
            f"--num_references is {_REFERENCES.value} and --num_images {_IMAGES.value}; expected "
            f"at most {len(source) // 2}, half of the images"
        )


def _sets(source: PixelSource) -> Iterator[tuple[str, float, np.ndarray]]:
    """(kind, strength, uint8 [num_images,H,W,C]) of each set."""
    positions = np.arange(1, len(source), 2)
    labels, count = source.labels[positions], _IMAGES.value
    plain = source.images[positions[:count]].astype(np.float32)
    yield _AS_THEY_ARE, 0, _as_pixels(plain)
    noise = np.random.default_rng(0).standard_normal(plain.shape, np.float32)
    for sigma in _STRENGTHS["blurred"][0]:
        yield "blurred", sigma, _as_pixels(gaussian_filter(plain, (0, sigma, sigma, 0)))
    for deviation in _STRENGTHS["noisy"][0]:
        yield "noisy", deviation, _as_pixels(plain + np.float32(deviation) * noise)
    for share in _STRENGTHS["fewer classes"][0]:
        kept = round((1 - share) * source.num_classes)
        of_kept = positions[labels < kept][:count]
        if len(of_kept) < count:
            raise UserError(
                f"--num_images is {count}; expected at most {len(of_kept)}, what {kept} classes of "
                "half of the images have"
            )
        yield "fewer classes", share, source.images[of_kept]


def _as_pixels(images: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def _image_set(source: str, images: np.ndarray) -> ImageSet:
    def read(ranges):
        for each in ranges:
            part = images[each.start : each.stop]
            yield np.broadcast_to(part, (*part.shape[:3], 3))

    return ImageSet(source, len(images), images.shape[1:3], read, grey=images.shape[3] == 1)


def _figures(samples: Statistics, reference: Statistics) -> dict[str, float]:
    rows = samples.features, reference.features
    precision, recall = precision_recall(*rows)
    size = min(1000, len(rows[0]), len(rows[1]))
    pair = samples.gaussians["features"], reference.gaussians["features"]
    return {
        "distance": frechet_distance(*pair),
        "kernel_distance": float(kernel_distance(*rows, subset_size=size).mean()),
        "precision": precision,
        "recall": recall,
    }


def _out_of_order(results: list[dict[str, Any]]) -> list[str]:
    """What is not in the order that it must have, a line each."""
    wrong = []
    for kind, signs in _MUST.items():
        rows = [row for row in results if row["kind"] in (_AS_THEY_ARE, kind)]
        for figure, sign in signs.items():
            values = [row[figure] for row in rows]
            if not (sign * np.diff(values) > 0).all():
                shown = ", ".join(f"{value:.4g}" for value in values)
                wrong.append(f"{figure} of {kind}, by strength: {shown}")
    return wrong


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    """A panel a kind: the distance against the strength."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(_STRENGTHS), figsize=(11, 3.6), dpi=110, sharey=True, layout="constrained"
    )
    for axes, (kind, (_, unit)) in zip(panels, _STRENGTHS.items(), strict=True):
        rows = [row for row in results if row["kind"] in (_AS_THEY_ARE, kind)]
        axes.semilogy([row["strength"] for row in rows], [row["distance"] for row in rows], "o-")
        axes.set(title=kind, xlabel=unit)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Fréchet distance to the other half")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    command.run(main)
