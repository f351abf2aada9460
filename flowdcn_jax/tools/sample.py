"""Draws images with a trained model's EMA weights: python sample.py --workdir=DIR [--classes=3,7]

--weights=NAME draws with published weights, which are fetched and converted once, and the settings
of their published figures; --weights=DIR with a run's, as --workdir. python -m
flowdcn_jax.tools.weights list says which names there are.

Writes grid.png and samples.npz (arr_0: uint8 NHWC, as the ADM evaluator reads it; arr_1: classes),
and images/00000.png ... with --save_images. The same command goes on with a run that was stopped.
--compare=steps (or samplers, image_size, resolution_adjustment) writes one strip instead. Several
hosts: as train.py, with --distributed.
"""

from flowdcn_jax import command, weights_flags
from flowdcn_jax.sampling import ModelChoice, Output, Request, Settings

_MODEL = weights_flags.define_model()
_OPTIONS = command.option_flags(Request, Settings, ModelChoice, Output)
command.define_device_flags()


def main() -> None:
    _, model = _MODEL()
    command.use_devices()
    # Imported here so that usage errors come at once.
    import jax

    from flowdcn_jax import sampling

    picture = sampling.sample_to_folder(model, **_OPTIONS())
    if jax.process_index() == 0:
        print(picture)


if __name__ == "__main__":
    command.run(main)
