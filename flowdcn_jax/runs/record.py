"""What a run may go on with: the checks of a config and of data against what its folder tells."""

import json
from typing import Any

from flowdcn_jax.config import fixed_keys, flatten, model_config, modernise
from flowdcn_jax.data import BucketedSource, Source
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.runs.checkpoint import SavedRun

# Keys that were added after runs had been saved, with the values that mean what those did. (The
# defaults of config.model are such values for its own; the other fixed keys were always there.)
ADDED = {"data.aspect_buckets.count": 0, "optimizer.name": "adamw"}


def check_resumable(saved: dict, config, *, weights_only: bool = False) -> None:
    """Refuses to go on with a run under a config that differs in what cannot change.

    Args:
        saved: the config beside the run's checkpoint, as nested dicts.
        config: the config asked for.
        weights_only: the checkpoint holds converted weights; then only the model is fixed.

    Raises:
        ConfigError: it names every key that differs, with both values.
    """
    before, now = _fixed_values(saved), _fixed_values(json.loads(config.to_json()))
    if weights_only:
        before, now = (
            {key: value for key, value in values.items() if key.startswith("model.")}
            for values in (before, now)
        )
    differences = _differences(before, now, prefix="config.")
    if differences:
        raise ConfigError(
            "the workdir holds a run whose config differs in what cannot change: "
            + "; ".join(differences)
            + ". Use the old values, or another --workdir"
        )


def check_same_data(saved: SavedRun, source: Source | BucketedSource) -> None:
    """Refuses to go on with a run on other data, whatever the names of folders.

    A run that was saved before data sets had identities may go on with any data; but its latents
    were multiplied by its own config.data.latent_scale, which must be their encoder's scale.

    Args:
        saved: what the run's checkpoint tells.
        source: the data asked for.

    Raises:
        ConfigError: it names what differs.
    """
    if saved.weights_only:
        return
    differences = []
    if saved.data_identity is not None:
        before, now = flatten(saved.data_identity), flatten(source.identity)
        differences = _differences(before, now, prefix="data.")
    elif source.encoder is not None and "latent_scale" in saved.config["data"]:
        before = {"scale": saved.config["data"]["latent_scale"], "shift": 0}
        now = {"scale": source.encoder.scale, "shift": source.encoder.shift}
        differences = _differences(before, now, prefix="latents.")
    if differences:
        raise ConfigError(
            "the workdir holds a run on other data than config.data.data_dir gives: "
            + "; ".join(differences)
            + ". Use the old data, or another --workdir"
        )


def _fixed_values(config: dict) -> dict[str, Any]:
    """The values of a saved config that cannot change, by dotted key, in today's names."""
    config = modernise(json.loads(json.dumps(config)))
    name = config["model"]["name"]
    values = flatten({"model": model_config(name)}) | ADDED | flatten(config)
    if not values["data.aspect_buckets.count"]:  # the rest of the section means nothing then
        values = {k: v for k, v in values.items() if not k.startswith("data.aspect_buckets.")}
        values["data.aspect_buckets.count"] = 0
    return {key: values[key] for key in sorted(fixed_keys(name) & values.keys())}


def _differences(before: dict, now: dict, *, prefix: str) -> list[str]:
    """What differs between two flat dicts: "KEY: old -> new" each."""
    return [
        f"{prefix}{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
