"""Draws images with a trained model's EMA weights: python sample.py --workdir=DIR [--classes=3,7]

Writes grid.png and samples.npz (arr_0: uint8 NHWC, as the ADM evaluator reads it; arr_1: classes)
to --out, and images/00000.png ... with --save_images. The model and its settings are those saved
beside the checkpoint.
"""

import sys

from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest by default.")
_CLASSES = flags.DEFINE_list(
    "classes", None, "Classes in turn, numbers or names; by default the config's."
)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 64, "Images to draw.", lower_bound=1)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 50, "Steps of the ODE solver.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float(
    "guidance", 1.375, "Classifier-free guidance; 1: none.", lower_bound=0.0
)
_IMAGE_SIZE = flags.DEFINE_string(
    "image_size", None, "HxW in pixels, such as 256x384; by default the size of training."
)
_SEED = flags.DEFINE_integer("seed", 0, "Image i depends on it and on i alone.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Output folder; by default WORKDIR/samples/step_STEP.")
_SAVE_IMAGES = flags.DEFINE_bool("save_images", False, "Write every image as a PNG of its own too.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "Images at a time on each device; does not change them.", lower_bound=1
)
_AUTOENCODER = flags.DEFINE_string(
    "autoencoder", None, "Decoder: sd_vae, taesd, taef1 or taef2; by default the config's."
)
_AUTOENCODER_WEIGHTS = flags.DEFINE_string(
    "autoencoder_weights", None, "Its safetensors file, or the folder; by default the config's."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    # Imported here so that --help and usage errors come at once.
    from flowdcn_jax import sampling
    from flowdcn_jax.errors import UserError

    try:
        grid = sampling.sample_to_folder(
            _WORKDIR.value,
            step=_STEP.value,
            classes=_CLASSES.value,
            num_images=_NUM_IMAGES.value,
            num_steps=_NUM_STEPS.value,
            guidance=_GUIDANCE.value,
            image_size=_IMAGE_SIZE.value,
            seed=_SEED.value,
            out=_OUT.value,
            save_images=_SAVE_IMAGES.value,
            batch_size=_BATCH_SIZE.value,
            autoencoder=_AUTOENCODER.value,
            autoencoder_weights=_AUTOENCODER_WEIGHTS.value,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    print(grid)


if __name__ == "__main__":
    app.run(main)
