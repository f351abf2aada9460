"""The figures: their names, values and counts, and what takes meaning from them."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from flowdcn_jax.evaluation.gaussian import frechet_distance
from flowdcn_jax.evaluation.inception_score import SPLITS
from flowdcn_jax.evaluation.kernel import NUM_SUBSETS, SEED, SUBSET_SIZE, kernel_distance
from flowdcn_jax.evaluation.neighbours import NEIGHBOURS, precision_recall
from flowdcn_jax.evaluation.statistics import FEATURES, SPATIAL, Statistics

# SHA-256 of Inception's published file, as the name pt_inception-2015-12-05-6726825d.pth has it.
_PUBLISHED_INCEPTION = "6726825d"
_DINOV2_FEATURES = 1024  # of ViT-L/14, which FD-DINOv2 is of

_FEW_SCORED = 5000  # images; a split of ADM's
_FEW_NEIGHBOURS = 1000  # images; below it the shares say little


@dataclasses.dataclass(frozen=True)
class Figure:
    """One result.

    Attributes:
        name: with the network, where it is not the one that the bare name stands for.
        value: None: it cannot be made; `note` says why.
        num_samples: images that it is of; None: not known.
        num_references: the same of the reference; None also where it has no part.
        note: what takes meaning from it; "": nothing.
        details: what else decides it, or follows from it, for JSON.
    """

    name: str
    value: float | None
    num_samples: int | None
    num_references: int | None
    note: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The value for a screen."""
        return "none" if self.value is None else f"{self.value:.6g}"


def make_figures(
    samples: Statistics, references: Statistics, network: dict[str, Any]
) -> list[Figure]:
    """All figures of a network, which `network` describes as `describe(features)` does.

    Of Inception FID, sFID, Inception score, precision, recall and KID; of DINOv2 FD-DINOv2,
    precision and recall; of others FD and KID.
    """
    makers = _MAKERS.get(network["network"], (_distances, _kernel_distance))
    return [figure for make in makers for figure in make(samples, references, network)]


def network_label(network: dict[str, Any]) -> str:
    """The network's name; "" for Inception with its published weights: FID is of no other."""
    name = network["network"]
    if name == "dinov2" and network["num_features"] == _DINOV2_FEATURES:
        return "DINOv2"
    hashes = [network.get(key) or "" for key in ("source_sha256", "weights_sha256")]
    if name != "inception":
        return name
    if any(each.startswith(_PUBLISHED_INCEPTION) for each in hashes):
        return ""
    return f"inception with weights {hashes[1][:8]}"


def _distances(samples: Statistics, references: Statistics, network: dict) -> Iterator[Figure]:
    label, counts = network_label(network), (samples.count, references.count)
    kind = f"FD-{label}" if label else "FID"
    names = {FEATURES: kind, SPATIAL: f"s{kind}"}
    for key in samples.gaussians:
        if key not in references.gaussians:
            yield Figure(names[key], None, *counts, "the reference has no spatial features")
            continue
        distance = frechet_distance(samples.gaussians[key], references.gaussians[key])
        num_features = len(samples.gaussians[key].mean)
        why = f"the covariance of {num_features} features is singular"
        note = _too_few(counts, num_features + 1, why)
        # Below 0 is rounding.
        yield Figure(names[key], max(distance, 0.0), *counts, note, {"unclipped": distance})


def _inception_score(
    samples: Statistics, references: Statistics, network: dict
) -> Iterator[Figure]:
    name, scores = _named("inception score", network), samples.scores
    if scores is None:
        yield Figure(name, None, samples.count, None, "not kept with the statistics")
        return
    # Of ADM's files all images are read for it, but `count` is not known.
    count = samples.count or len(samples.features)
    details = {"deviation": float(scores.std()), "splits": scores.tolist()}
    details["how"] = SPLITS[network["protocol"]].__doc__
    yield Figure(
        name,
        float(scores.mean()),
        count,
        None,
        _too_few([count], _FEW_SCORED, "it rises with them"),
        details,
    )


def _precision_recall(
    samples: Statistics, references: Statistics, network: dict
) -> Iterator[Figure]:
    names = [_named(name, network) for name in ("precision", "recall")]
    counts, problem = _features_of(samples, references, NEIGHBOURS + 1)
    if problem:
        yield from (Figure(name, None, *counts, problem) for name in names)
        return
    shares = precision_recall(samples.features, references.features)
    note = _too_few(counts, _FEW_NEIGHBOURS, "shares of so few say little")
    details = {"neighbours": NEIGHBOURS, "distances": "float32, without TF32"}
    for name, share in zip(names, shares, strict=True):
        yield Figure(name, share, *counts, note, details)


def _kernel_distance(
    samples: Statistics, references: Statistics, network: dict
) -> Iterator[Figure]:
    name = _named("KID", network)
    counts, problem = _features_of(samples, references, 2)
    if problem:
        yield Figure(name, None, *counts, problem)
        return
    size = min(SUBSET_SIZE, *counts)
    values = kernel_distance(samples.features, references.features, subset_size=size)
    note = "" if size == SUBSET_SIZE else f"subsets of {size} in place of {SUBSET_SIZE}"
    details = {"deviation_of_subsets": float(values.std()), "subsets": NUM_SUBSETS}
    details |= {"subset_size": size, "seed": SEED}
    yield Figure(name, float(values.mean()), *counts, note, details)


def _features_of(
    samples: Statistics, references: Statistics, least: int
) -> tuple[list[int | None], str]:
    """Numbers of features kept, and why they do not suffice."""
    sides = {"samples": samples.features, "reference": references.features}
    counts = {name: None if rows is None else len(rows) for name, rows in sides.items()}
    problems = [f"no features of the {name}" for name in sides if counts[name] is None]
    problems += [
        f"fewer than {least} images of the {name}"
        for name in sides
        if (counts[name] or least) < least
    ]
    return list(counts.values()), "; ".join(problems)


def _named(name: str, network: dict[str, Any]) -> str:
    label = network_label(network)
    return f"{name} ({label})" if label else name


def _too_few(counts: Iterable[int | None], least: int, why: str) -> str:
    fewest = min((count for count in counts if count is not None), default=least)
    return f"only {fewest} images: {why}" if fewest < least else ""


_MAKERS = {
    "inception": (_distances, _inception_score, _precision_recall, _kernel_distance),
    "dinov2": (_distances, _precision_recall),
}
