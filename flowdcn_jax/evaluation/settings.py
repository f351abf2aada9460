"""Every option of evaluation, declared once.

The flags of evaluate.py and reference_stats and the tables of docs/evaluation.md follow from here.
Imports no JAX, so that --help and usage errors come at once.
"""

import dataclasses
from pathlib import Path
from typing import Any

from flowdcn_jax.errors import UserError
from flowdcn_jax.files import local_path_text
from flowdcn_jax.options import at_least, checked, name_in, one_of, option
from flowdcn_jax.sampling.settings import Request


class EvaluationError(UserError, ValueError):
    """Images, statistics or options that cannot be used; the message names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureChoice:
    """The network that sees the images"""

    features: str = option(
        "inception",
        "inception (FID and its like), dinov2 (FD-DINOv2) or efficientnet_lite0",
        name_in("flowdcn_jax.evaluation.features:NETWORKS"),
    )
    weights: Path | None = option(
        None, "its safetensors file, the folder that holds it, or a name such as inception"
    )
    protocol: str = option(
        "adm",
        "whose evaluator is followed",
        name_in("flowdcn_jax.evaluation.features:PROTOCOLS"),
    )
    features_dtype: str = option(
        "float32", "what the network computes in", one_of("float32", "bfloat16")
    )
    fast: bool = option(False, "products of float32 in TF32, where the device has it")
    features_batch_size: int = option(
        64, "images that the network sees at a time on each device", at_least(1)
    )

    def __post_init__(self):
        checked(self, error=EvaluationError)

    def load(self) -> Any:
        """The network with its weights, as `load_features` gives it."""
        from flowdcn_jax.evaluation.features import load_features  # here, since it imports JAX

        return load_features(
            self.features,
            weights=self.weights,
            protocol=self.protocol,
            dtype=self.features_dtype,
            fast=self.fast,
            batch_size=self.features_batch_size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageChoice:
    """Which images of a folder or data set"""

    crop: int | None = option(
        None,
        "side in pixels of the central square that is cut, as ADM does, out of each image of a "
        "folder or TFDS data set; of digits their size",
        at_least(1),
        unset="none: images are whole",
    )
    split: str = option("train", "split of a data set, or a slice of it")
    data_dir: str | None = option(
        None,
        "folder of prepared data sets",
        parse=local_path_text,
        unset="$TFDS_DATA_DIR, else that of TFDS",
    )

    def __post_init__(self):
        checked(self, error=EvaluationError)


def _with_default(name: str, default: Any) -> Any:
    """An option of Request with a default of its own."""
    declared = Request.__dataclass_fields__[name].metadata["option"]
    return option(default, **declared | {"unset": None})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnRequest(Request):
    """Which samples of a run, how many and how many at a time"""

    classes: tuple[str, ...] = _with_default("classes", "all")
    num_images: int = _with_default("num_images", 50_000)
