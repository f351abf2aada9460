"""What no tensor of the authors' format tells of a model: in safetensors' metadata, or by flags."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from flowdcn_jax.published_weights.weights_file import PublishedWeightsError
from flowdcn_jax.runs.folder import differences
from flowdcn_jax.runs.record import fixed_values

KEY = "flowdcn_jax"
DTYPE_KEY = "flowdcn_jax_dtype"  # of parameters, in exports that are not float32
EXPORTED_DTYPES = ("float32", "float16")
AUTHORS_MODEL = {"boundary": "truncate", "max_scale": 6.0}  # of FlowDCN
REMEDY = (
    "convert with the config of the training's resolution, and draw other sizes with sample.py "
    "--image_size=HxW"
)


def metadata_of(config, *, dtype: str) -> dict[str, str]:
    """The metadata of an export: what a run of this config keeps of its model, and its size.

    `dtype` is that of the parameters.
    """
    told = {"format": "pt", KEY: json.dumps(_told(config), sort_keys=True)}
    return told if dtype == "float32" else told | {DTYPE_KEY: dtype}


def stored_dtype(metadata: Mapping[str, str]) -> str:
    """The dtype of a source's parameters: float32 unless it is an export that says otherwise.

    Raises:
        PublishedWeightsError: one that no export has.
    """
    dtype = metadata.get(DTYPE_KEY, "float32")
    if dtype not in EXPORTED_DTYPES:
        expected = " or ".join(EXPORTED_DTYPES)
        raise PublishedWeightsError(
            f"the source's metadata {DTYPE_KEY!r} is {dtype!r}; expected {expected}"
        )
    return dtype


def fit_config(config, metadata: Mapping[str, str], *, boundary: str | None) -> None:
    """Sets FlowDCN's config.model.boundary, and holds the rest of the config to the metadata.

    Args:
        config: it is changed in place.
        metadata: of the source; the authors' files have none.
        boundary: asked for; None: what the metadata says, or the authors'.

    Raises:
        PublishedWeightsError: the metadata is damaged, or says other than config or `boundary`.
    """
    deformable = config.model.name == "flowdcn"
    if boundary is not None and not deformable:
        raise PublishedWeightsError(
            f"--boundary is {boundary}; expected none for the model {config.model.name!r}, which "
            "has no deformable blocks"
        )
    if KEY not in metadata:
        if deformable:
            config.model.boundary = boundary or AUTHORS_MODEL["boundary"]
            _warn_of_max_scale(config.model.max_scale)
        return
    try:
        told = json.loads(metadata[KEY])
        there = told["model"].get("boundary")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PublishedWeightsError(
            f"the source's metadata {KEY!r} is damaged: {type(error).__name__}: {error}"
        ) from error
    if deformable:
        config.model.boundary = boundary or there or AUTHORS_MODEL["boundary"]
    if wrong := differences(told, _told(config), "config"):
        raise PublishedWeightsError(
            "the source's metadata says other than the config and --boundary: "
            f"{'; '.join(wrong)}. Expected the first of each pair; of other sizes {REMEDY}"
        )


def warn_of_other_outputs(model) -> None:
    """Warns of each value with which the authors' code would give other outputs."""
    for key, value in AUTHORS_MODEL.items():
        if model.name == "flowdcn" and model[key] != value:
            logging.warning(
                "these weights were trained with model.%s=%r; the authors' code has %r, so it "
                "gives other outputs. The file's metadata says it",
                key,
                model[key],
                value,
            )


def _told(config) -> dict[str, Any]:
    values = fixed_values(json.loads(config.to_json()))
    return {
        "model": {
            key.removeprefix("model."): value
            for key, value in values.items()
            if key.startswith("model.")
        },
        "data": {"image_size": config.data.image_size},
    }


def _warn_of_max_scale(max_scale: float) -> None:
    if max_scale != AUTHORS_MODEL["max_scale"]:
        logging.warning(
            "config.model.max_scale is %s; published weights were trained with %s, and the source "
            "does not say otherwise",
            max_scale,
            AUTHORS_MODEL["max_scale"],
        )
