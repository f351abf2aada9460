"""Statistics in .npz files: ADM's reference batches, and what is written here.

mu, sigma        mean and covariance of the features (of Inception's pool)
mu_s, sigma_s    of the spatial features, if the network has them
arr_0            ADM's alone: some of the images, for precision and recall
features         ours alone: features for precision, recall and KID, float32 [K,F]
scores           ours alone: the Inception score of each split
record           ours alone: JSON of the count, the network and its weights, and the images
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from flowdcn_jax.evaluation.errors import EvaluationError
from flowdcn_jax.evaluation.image_sets import (
    IMAGES_KEY,
    ImageSet,
    npz_arrays,
    open_images,
    open_npz,
    reporting_damage,
)
from flowdcn_jax.evaluation.moments import Gaussian
from flowdcn_jax.evaluation.statistics import FEATURES, SPATIAL, Statistics
from flowdcn_jax.files import atomic_write

_GAUSSIAN_KEYS = {FEATURES: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
_ROUNDING = 1e-5  # of covariances in float32, relative


def open_side(source: str, **options: Any) -> ImageSet | Statistics:
    """Images, or the statistics of an .npz file with `mu`, as ADM's evaluator has it.

    Args:
        source: see `open_images`; or an .npz file of statistics.
        options: of `open_images`.

    Raises:
        EvaluationError, DataError: neither is there, or it cannot be used.
    """
    path = Path(source).expanduser()
    if path.is_file() and "mu" in npz_arrays(path):
        return read_statistics(path)
    return open_images(source, **options)


def read_statistics(path: Path) -> Statistics:
    """The statistics of a file; its images, if it has any, stay unread.

    Raises:
        EvaluationError: the file is damaged or needs pickles, or no such statistics are in it.
    """
    keys = npz_arrays(path).keys()
    with reporting_damage(path), np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in keys - {IMAGES_KEY}}
        record = json.loads(str(arrays.get("record", "{}")))
    gaussians = {
        name: _read_gaussian(path, arrays, *names)
        for name, names in _GAUSSIAN_KEYS.items()
        if names[0] in keys
    }
    images, unread = record.get("images", {"grey": False}), None
    if IMAGES_KEY in keys:
        unread = open_npz([path])
        images = unread.describe()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Statistics(
        count=record.get("count"),
        gaussians=gaussians,
        features=_read_features(path, arrays, len(gaussians[FEATURES].mean)),
        scores=arrays.get("scores"),
        network=record.get("network"),
        images=images | {"file": str(path), "file_sha256": digest},
        unread=unread,
    )


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Writes what `read_statistics` reads, and what ADM's evaluator takes for a reference."""
    record = {name: getattr(statistics, name) for name in ("count", "network", "images")}
    arrays = {"record": np.array(json.dumps(record))}
    for name, gaussian in statistics.gaussians.items():
        arrays |= zip(_GAUSSIAN_KEYS[name], gaussian, strict=True)
    arrays |= {"features": statistics.features, "scores": statistics.scores}
    with atomic_write(path) as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def _read_gaussian(path: Path, arrays: dict[str, np.ndarray], *keys: str) -> Gaussian:
    """A mean and a covariance, found to be that."""
    if keys[1] not in arrays:
        raise EvaluationError(f"{path} lacks {keys[1]}; expected it beside {keys[0]}")
    mean, covariance = (arrays[key] for key in keys)
    floats = mean.dtype.kind == covariance.dtype.kind == "f"
    if not floats or mean.ndim != 1 or covariance.shape != (len(mean),) * 2:
        raise EvaluationError(
            f"{path}: {keys[0]} is {mean.dtype} {list(mean.shape)}, {keys[1]} {covariance.dtype} "
            f"{list(covariance.shape)}; expected floats [D] and [D,D]"
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise EvaluationError(f"{path}: {keys[0]} or {keys[1]} is not finite; expected numbers")
    deviations = np.sqrt(np.maximum(np.diag(covariance), 0))
    tolerance = _ROUNDING * np.abs(np.diag(covariance)).max()
    asymmetric = np.abs(covariance - covariance.T).max() > tolerance
    if asymmetric or (np.abs(covariance) > np.outer(deviations, deviations) + tolerance).any():
        raise EvaluationError(
            f"{path}: {keys[1]} is no covariance; expected it symmetric, positive"
        )
    return Gaussian(mean, covariance)


def _read_features(
    path: Path, arrays: dict[str, np.ndarray], num_features: int
) -> np.ndarray | None:
    features = arrays.get("features")
    if features is None:
        return None
    if features.dtype != np.float32 or features.shape[1:] != (num_features,):
        raise EvaluationError(
            f"{path}: features are {features.dtype} {list(features.shape)}; expected float32 "
            f"[K,{num_features}]"
        )
    if not np.isfinite(features).all():
        raise EvaluationError(f"{path}: features are not finite; expected numbers")
    return features
