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

from flowdcn_jax.evaluation.gaussian import Gaussian
from flowdcn_jax.evaluation.image_sets import (
    IMAGES_KEY,
    ImageSet,
    npz_arrays,
    open_images,
    open_npz,
    reporting_damage,
)
from flowdcn_jax.evaluation.settings import EvaluationError
from flowdcn_jax.evaluation.statistics import FEATURES, SPATIAL, Statistics
from flowdcn_jax.files import atomic_write, local_path

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
    path = local_path(source)
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
    features = None
    if "features" in keys:
        features = _floats(path, arrays, "features", (None, len(gaussians[FEATURES].mean)))
    images, unread = record.get("images", {"grey": False}), None
    if IMAGES_KEY in keys:
        unread = open_npz([path])
        images = unread.describe()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Statistics(
        count=record.get("count"),
        gaussians=gaussians,
        features=features,
        scores=arrays.get("scores"),
        network=record.get("network"),
        images=images | {"file": str(path), "file_sha256": digest},
        unread=unread,
    )


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Writes what `read_statistics` reads, under ADM's names as far as they go.

    Raises:
        EvaluationError: the disk is full, or the file cannot be written.
    """
    record = {name: getattr(statistics, name) for name in ("count", "network", "images")}
    arrays = {"record": np.array(json.dumps(record))}
    for name, gaussian in statistics.gaussians.items():
        arrays |= zip(_GAUSSIAN_KEYS[name], gaussian, strict=True)
    arrays |= {"features": statistics.features, "scores": statistics.scores}
    try:
        with atomic_write(path) as file:
            np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error}") from error


def _read_gaussian(path: Path, arrays: dict[str, np.ndarray], *keys: str) -> Gaussian:
    """A mean and a covariance, found to be that."""
    mean = _floats(path, arrays, keys[0], (None,))
    covariance = _floats(path, arrays, keys[1], (len(mean),) * 2)
    deviations = np.sqrt(np.maximum(np.diag(covariance), 0))
    tolerance = _ROUNDING * np.abs(np.diag(covariance)).max()
    asymmetric = np.abs(covariance - covariance.T).max() > tolerance
    if asymmetric or (np.abs(covariance) > np.outer(deviations, deviations) + tolerance).any():
        raise EvaluationError(
            f"{path}: {keys[1]} is no covariance; expected it symmetric and positive"
        )
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def _floats(
    path: Path, arrays: dict[str, np.ndarray], key: str, shape: tuple[int | None, ...]
) -> np.ndarray:
    """An array of a file, found finite and of this shape, in which None is any size."""
    if key not in arrays:
        raise EvaluationError(f"{path} lacks {key}; it has {', '.join(sorted(arrays))}")
    array = arrays[key]
    fits = len(array.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, array.shape, strict=True)
    )
    if array.dtype.kind != "f" or not fits:
        shown = ["any" if size is None else size for size in shape]
        raise EvaluationError(
            f"{path}: {key} is {array.dtype} {list(array.shape)}; expected floats {shown}"
        )
    if not np.isfinite(array).all():
        raise EvaluationError(f"{path}: {key} is not finite; expected numbers")
    return array
