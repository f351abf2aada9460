"""An evaluation from its two sides to figures, a table and files."""

import dataclasses
from pathlib import Path
from typing import Any

from flowdcn_jax.command import write_json
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.evaluation.figures import Figure, make_figures, network_label
from flowdcn_jax.evaluation.image_sets import ImageSet
from flowdcn_jax.evaluation.reference_files import write_statistics
from flowdcn_jax.evaluation.settings import EvaluationError
from flowdcn_jax.evaluation.statistics import (
    FEATURES,
    MAX_FEATURES,
    Features,
    Statistics,
    collect,
    describe,
)

# What must be the same on both sides.
_COMPARED = ("network", "protocol", "preprocessing", "precision", "weights_sha256")


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `evaluate`.

    Attributes:
        figures: the results.
        samples: the numbers of the generated images.
        references: those of the real ones.
        network: that both were made with.
        notes: what a reader should know, a line each.
    """

    figures: list[Figure]
    samples: Statistics
    references: Statistics
    network: dict[str, Any]
    notes: tuple[str, ...]

    def table(self) -> str:
        """The figures for a screen."""
        rows = [("figure", "value", "samples", "reference", "")]
        for figure in self.figures:
            counts = (figure.num_samples, figure.num_references)
            shown = ("-" if count is None else f"{count}" for count in counts)
            rows.append((figure.name, figure.shown, *shown, figure.note))
        return "\n".join([*aligned(rows), *(f"note: {note}" for note in self.notes)])

    def write(self, path: Path) -> None:
        """Writes FILE.json, and FILE.samples.npz and FILE.reference.npz with both sides' numbers.

        From these two `evaluate` makes the figures again, without images and weights.
        """
        stem = path.name.removesuffix(".json")
        files = {name: path.with_name(f"{stem}.{name}.npz") for name in ("samples", "reference")}
        write_statistics(files["samples"], self.samples)
        write_statistics(files["reference"], self.references)
        write_json(path, self.as_dict(files) | {"machine": describe_machine()})

    def as_dict(self, files: dict[str, Path]) -> dict[str, Any]:
        """What decides the figures, for JSON; `files` hold the numbers of each side."""
        report = {
            "figures": [dataclasses.asdict(figure) for figure in self.figures],
            "network": self.network,
            "statistics": "float64; covariances divided by n - 1",
            "notes": list(self.notes),
        }
        for name, side in {"samples": self.samples, "reference": self.references}.items():
            report[name] = {
                "count": side.count,
                "features_kept": None if side.features is None else len(side.features),
                "images": side.images,
                "file": files[name].name,
            }
        return report


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, the last as it is, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = []
    for name, *numbers, note in rows:
        cells = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells, note]).rstrip())
    return lines


def evaluate(
    samples: ImageSet | Statistics,
    references: ImageSet | Statistics,
    features: Features | None,
    *,
    num_features: int = MAX_FEATURES,
    title: str | None = "samples",
) -> Report:
    """Compares images, or their statistics, with others; on all devices of all processes.

    Args:
        samples: generated images; see `open_side`, or an `ImageSet` of your own.
        references: real ones.
        features: the network, in its protocol; None if both sides are statistics.
        num_features: images a side whose features are kept for precision, recall and KID.
        title: of the samples' progress bar; None: there are no bars.

    Raises:
        EvaluationError: a side cannot be used, or they are of different networks, weights or
            protocols; before any work where that can be told.
    """
    network = check_sides(samples, references, features)
    options = dict(features=features, num_features=num_features)
    samples = _complete(samples, title=title, **options)
    references = _complete(references, title=title and "reference", **options)
    figures = make_figures(samples, references, network)
    return Report(figures, samples, references, network, _notes(samples, references))


def needs_network(side: ImageSet | Statistics) -> bool:
    """Whether there are images that a network has to see."""
    return isinstance(side, ImageSet) or side.unread is not None


def check_sides(
    samples: ImageSet | Statistics, references: ImageSet | Statistics, features: Features | None
) -> dict[str, Any]:
    """The network that both sides are of, or will be, as `describe` has it.

    Raises:
        EvaluationError: they cannot be compared.
    """
    _check_grey(samples, references)
    sides = {"samples": samples, "reference": references}
    known = [] if features is None else [describe(features)]
    for name, side in sides.items():
        if features is None and needs_network(side):
            raise EvaluationError(f"the {name} are images; expected a network to run on them")
        if isinstance(side, Statistics) and side.network is not None:
            known.append(side.network)
    if not known:
        raise EvaluationError("neither side says of which network its statistics are; expected one")
    network = known[0]
    for name, side in sides.items():
        if isinstance(side, Statistics):
            _check_same(name, side, network)
    return network


def _check_same(name: str, side: Statistics, network: dict[str, Any]) -> None:
    """Raises unless statistics are of this network."""
    where = f"the statistics of the {name} ({_source(side)})"
    num_features = len(side.gaussians[FEATURES].mean)
    if num_features != network["num_features"]:
        raise EvaluationError(
            f"{where} are of {num_features} features; expected {network['num_features']}"
        )
    if side.network is None:
        if network_label(network) or network["protocol"] != "adm":
            raise EvaluationError(
                f"{where} do not say of which network they are, so they are taken for ADM's; "
                f"expected such of {network['network']} with weights {network['weights_sha256']}, "
                f"protocol {network['protocol']}"
            )
        return
    for key in _COMPARED:
        if side.network[key] != network[key]:
            raise EvaluationError(
                f"{where} have {key} {side.network[key]!r}; expected {network[key]!r}, as of the "
                "images or the other side"
            )


def _source(side: Statistics) -> str:
    """Where statistics are from: a file, or images."""
    return side.images.get("file") or side.images["source"]


def _check_grey(samples: ImageSet | Statistics, references: ImageSet | Statistics) -> None:
    grey = [_images(side)["grey"] for side in (samples, references)]
    if grey[0] != grey[1]:
        shown = ["grey" if each else "RGB" for each in grey]
        raise EvaluationError(f"the samples are {shown[0]}, the reference {shown[1]}; expected RGB")


def _images(side: ImageSet | Statistics) -> dict[str, Any]:
    return side.describe() if isinstance(side, ImageSet) else side.images


def _complete(
    side: ImageSet | Statistics, *, features: Features | None, num_features: int, title: str | None
) -> Statistics:
    """The side's statistics; of ADM's files the Gaussians, beside the features of their images."""
    if not needs_network(side):
        return side
    images = side if isinstance(side, ImageSet) else side.unread
    collected = collect(images, features, num_features=num_features, title=title)
    if isinstance(side, ImageSet):
        return collected
    return dataclasses.replace(
        side,
        features=collected.features,
        scores=collected.scores,
        network=collected.network,
        unread=None,
    )


def _notes(samples: Statistics, references: Statistics) -> tuple[str, ...]:
    notes = []
    sizes = [side.images.get("size") for side in (samples, references)]
    if None not in sizes and list(sizes[0]) != list(sizes[1]):
        shown = ["x".join(map(str, size)) for size in sizes]
        notes.append(f"samples have {shown[0]} pixels, the reference {shown[1]}")
    for name, side in {"samples": samples, "reference": references}.items():
        kept = None if side.features is None else len(side.features)
        if None not in (kept, side.count) and kept < side.count:
            notes.append(
                f"precision, recall and KID are of {kept} images of the {name}, evenly among all"
            )
    return tuple(notes)
