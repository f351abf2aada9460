"""Draws images with a trained model's EMA weights: python sample.py --workdir=DIR [--classes=3,7]

--weights=NAME draws with published weights, which are fetched and converted once, and the settings
of their published figures; --weights=DIR with a run's, as --workdir. python -m
flowdcn_jax.tools.weights list says which names there are.

Writes grid.png and samples.npz (arr_0: uint8 NHWC, as the ADM evaluator reads it; arr_1: classes),
and images/00000.png ... with --save_images. The same command goes on with a run that was stopped.
--compare=steps (or samplers, image_size, resolution_adjustment) writes one strip instead. Several
hosts: as train.py, with --distributed.
"""

from absl import flags

from flowdcn_jax import command
from flowdcn_jax.errors import UserError
from flowdcn_jax.sampling import ModelChoice, Output, Request, Settings

_WORKDIR = command.define_path("workdir", "Folder of the training run.")
_WEIGHTS = flags.DEFINE_string("weights", None, "Name of published weights, or a run's folder.")
_OPTIONS = command.option_flags(Request, Settings, ModelChoice, Output)
_obey_offline = command.define_offline()
command.define_device_flags()


def main() -> None:
    if (_WORKDIR.value is None) == (_WEIGHTS.value is None):
        raise UserError("give either --workdir=DIR, of a run, or --weights=NAME|DIR")
    _obey_offline()
    model = _WORKDIR.value or _named_or_folder(_WEIGHTS.value)
    command.use_devices()
    # Imported here so that usage errors come at once.
    import jax

    from flowdcn_jax import sampling

    picture = sampling.sample_to_folder(model, **_OPTIONS())
    if jax.process_index() == 0:
        print(picture)


def _named_or_folder(weights: str) -> str:
    """What --weights says, once it is found to be a name or the folder of a run.

    Raises:
        UserError: neither; or a folder of several runs.
    """
    from flowdcn_jax.files import local_path
    from flowdcn_jax.named_weights.table import find, named

    folder = local_path(weights)
    if named(weights) or (folder / "checkpoints").is_dir():
        return weights if named(weights) else str(folder)
    if not folder.is_dir():
        if "/" in weights:
            raise UserError(f"--weights={weights} is not there; expected a run's folder, or a name")
        find(weights)  # raises, with the nearest names
    runs = sorted(path.parent.name for path in folder.glob("*/checkpoints"))
    inside = f"; it holds {', '.join(runs)}: name one of them" if runs else ""
    raise UserError(f"--weights={weights} is no run's folder, which has checkpoints/{inside}")


if __name__ == "__main__":
    command.run(main)
