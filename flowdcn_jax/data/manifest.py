"""What the manifest of cached latents, their metadata.json, says about where they come from."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flowdcn_jax.data.errors import DataError
from flowdcn_jax.data.prepared import read_manifest

_EXAMPLE = (
    '{"settings": {"autoencoder": {"name": "sd_vae", "weights_sha256": null, "scale": 0.18215, '
    '"shift": 0.0}}}'
)


class Encoder(NamedTuple):
    """The autoencoder that made cached latents; models work on x = (latents - shift) * scale."""

    name: str  # as in config.autoencoder
    weights_sha256: str | None  # None: not known
    scale: float
    shift: float


def find_encoder(manifest: Mapping[str, Any] | None, *, where: str = "the manifest") -> Encoder:
    """The encoder that a manifest, or a source's `identity`, names under settings.autoencoder.

    Args:
        manifest: contents of metadata.json, or None where there is none.
        where: begins the message of an error.

    Raises:
        DataError: it names no encoder, or one without a positive scale and a shift.
    """
    try:
        found = manifest["settings"]["autoencoder"]
        encoder = Encoder(*(found[field] for field in Encoder._fields))
        whole = math.isfinite(encoder.shift) and 0 < encoder.scale < math.inf
    except (TypeError, KeyError):
        whole = False
    if not whole:
        raise DataError(
            f"{where} does not say which autoencoder encoded the latents, with which scale and "
            "shift: cache them again with flowdcn_jax.tools.cache_latents, or let it hold "
            f"{_EXAMPLE} with the values of the one that did"
        )
    return encoder


def latents_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the latents in a data set's folder.

    Raises:
        DataError: there is none, or it names no encoder.
    """
    manifest = read_manifest(folder)
    find_encoder(manifest, where=f"{folder}/metadata.json")
    return manifest
