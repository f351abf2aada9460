"""Flags of commands that take weights by name: --workdir or --weights, and --offline.

Imports no JAX, so that --help and usage errors come at once.
"""

import os
from collections.abc import Callable

from absl import flags

from flowdcn_jax import command
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import local_path

flags.disclaim_key_flags()  # flags defined here are those of the command that asks for them


def define_model() -> Callable[[], tuple[str, str]]:
    """Defines --workdir and --weights, of which one is given, and --offline.

    Returns:
        A function (flag, the run's folder or the name of published weights), once the flags are
        parsed; raises a UserError for none, both, and what is neither. --offline holds from then.
    """
    workdir = command.define_path("workdir", "Folder of the training run.")
    weights = flags.DEFINE_string(
        "weights", None, "Name of published weights (see flowdcn_jax.tools.weights); or a workdir."
    )
    obey_offline = define_offline()

    def model() -> tuple[str, str]:
        obey_offline()
        if (workdir.value is None) == (weights.value is None):
            raise UserError("give either --workdir=DIR, of a run, or --weights=NAME|DIR")
        if workdir.value is not None:
            return "workdir", workdir.value
        return "weights", _named_or_folder(weights.value)

    return model


def define_offline() -> Callable[[], None]:
    """Defines --offline, which is the hub's own HF_HUB_OFFLINE for this command.

    Returns:
        A function that lets the flag hold; comes before weights by name are asked for.
    """
    holder = flags.DEFINE_bool(
        "offline", False, "Fetch nothing: weights by name must be in the cache. As HF_HUB_OFFLINE."
    )

    def obey() -> None:
        if holder.value:
            os.environ["HF_HUB_OFFLINE"] = "1"

    return obey


def _named_or_folder(weights: str) -> str:
    """What --weights says, once it is found to be a name or the folder of a run.

    Raises:
        UserError: neither; or a folder of several runs.
    """
    from flowdcn_jax.named_weights.table import find, named  # here: it takes a moment

    if named(weights):
        return weights
    folder = local_path(weights)
    if (folder / "checkpoints").is_dir():
        return str(folder)
    if not folder.is_dir():
        if "/" not in weights:
            find(weights)  # raises, with the nearest names
        raise UserError(f"--weights={weights} is not there; expected a run's folder, or a name")
    runs = sorted(path.parent.name for path in folder.glob("*/checkpoints"))
    inside = f"; it holds {', '.join(runs)}: name one of them" if runs else ""
    raise UserError(f"--weights={weights} is no run's folder, which has checkpoints/{inside}")
