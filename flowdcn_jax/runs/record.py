"""What a run may go on with: the checks of a config and of data against what its folder tells."""

import json
from typing import Any

from flowdcn_jax.config import fixed_keys, flatten, model_config, modernise
from flowdcn_jax.data import BucketedSource, DataSource
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.runs.checkpoint import SavedRun
from flowdcn_jax.runs.folder import differences

# Keys that were added after runs had been saved, with the values that mean what those did. (The
# defaults of config.model are such values for its own; the other fixed keys were always there.)
ADDED = {
    "data.aspect_buckets.count": 0,
    "flow.objective": "velocity",
    "optimizer.name": "adamw",
}
# Where the images lay that latents were made of. The fingerprint, of names and sizes, tells them.
PATHS = {"data.settings.dataset"}


def fixed_values(config: dict) -> dict[str, Any]:
    """The values of a saved config that cannot change, by dotted key, in today's names."""
    config = modernise(json.loads(json.dumps(config)))
    name = config["model"]["name"]
    values = flatten({"model": model_config(name)}) | ADDED | flatten(config)
    if not values["data.aspect_buckets.count"]:  # the rest of the section means nothing then
        values = {k: v for k, v in values.items() if not k.startswith("data.aspect_buckets.")}
        values["data.aspect_buckets.count"] = 0
    return {key: values[key] for key in sorted(fixed_keys(name) & values.keys())}


def check_resumable(saved: dict, config, *, weights_only: bool = False) -> None:
    """Refuses to go on with a run under a config that differs in what cannot change.

    Args:
        saved: the config beside the run's checkpoint, as nested dicts.
        config: the config asked for.
        weights_only: the checkpoint holds converted weights; then only the model is fixed.

    Raises:
        ConfigError: it names every key that differs, with both values.
    """
    before, now = fixed_values(saved), fixed_values(json.loads(config.to_json()))
    if weights_only:
        before, now = (
            {key: value for key, value in values.items() if key.startswith("model.")}
            for values in (before, now)
        )
    found = differences(before, now, "config")
    if found:
        held = "converted weights whose config" if weights_only else "a run whose config"
        remedy = "Use the old values, or another --workdir"
        if weights_only:
            remedy += ", with this one as --init_from for other classes"
        raise ConfigError(
            f"the workdir holds {held} differs in what cannot change: {'; '.join(found)}. {remedy}"
        )


def check_same_data(saved: SavedRun, source: DataSource | BucketedSource) -> None:
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
    found = []
    if saved.data_identity is not None:
        told = saved.data_identity.get("settings", {}).get("fingerprint") is not None
        ignore = PATHS if told else ()
        found = differences(saved.data_identity, source.identity, "data", ignore=ignore)
    elif source.encoder is not None and "latent_scale" in saved.config["data"]:
        before = {"scale": saved.config["data"]["latent_scale"], "shift": 0}
        now = {"scale": source.encoder.scale, "shift": source.encoder.shift}
        found = differences(before, now, "latents")
    if found:
        raise ConfigError(
            "the workdir holds a run on other data than config.data.data_dir gives: "
            + "; ".join(found)
            + ". Use the old data, or another --workdir"
        )
