"""Draws images with a trained model's EMA weights: python sample.py --workdir=DIR [--classes=3,7]

Writes grid.png and samples.npz (arr_0: uint8 NHWC, as the ADM evaluator reads it; arr_1: classes),
and images/00000.png ... with --save_images. The same command goes on with a run that was stopped.
--compare=steps (or samplers, image_size, resolution_adjustment) writes one strip instead. Several
hosts: as train.py, with --distributed.
"""

from pathlib import Path

from absl import flags

from flowdcn_jax import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest by default.")
_EMA = flags.DEFINE_string(
    "ema", "ema", "EMA to draw with: ema, one of config.ema.others, or one made after training."
)
_CLASSES = flags.DEFINE_list(
    "classes",
    None,
    "Numbers or names, such as 'golden retriever,207', or all; by default the config's.",
)
_LABELS = flags.DEFINE_string("labels", "balanced", "balanced: the classes in turn; or random.")
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "Images to draw; by default the config's, and 4 to compare.", lower_bound=1
)
_SAMPLER = flags.DEFINE_string(
    "sampler",
    None,
    "euler (the default), heun, heun_cached, adams1 ... adams4, neural (5-10 or 15 steps); or an "
    "SDE's: euler_sde, euler_sde_mean, euler_sde_preserve.",
)
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "Steps from noise to image; by default the config's.", lower_bound=1
)
_LAST_STEP = flags.DEFINE_float(
    "last_step", None, "Length of the last step; by default as long as the others."
)
_TIME_SHIFT = flags.DEFINE_float(
    "time_shift", 1.0, "Above 1: shorter steps near the noise, for high resolutions."
)
_DIFFUSION = flags.DEFINE_string(
    "diffusion", None, "Of the SDE samplers: sigma (1 - t, the default), constant or zero."
)
_GUIDANCE = flags.DEFINE_float(
    "guidance", None, "Guidance weight; 1: none; by default the config's.", lower_bound=0.0
)
_GUIDANCE_CHANNELS = flags.DEFINE_string(
    "guidance_channels", "all", "all, or three: only the first three are guided."
)
_GUIDANCE_INTERVAL = flags.DEFINE_list(
    "guidance_interval", None, "LOW,HIGH: guidance for these t only; t=0 is noise, t=1 the image."
)
_GUIDANCE_SCHEDULE = flags.DEFINE_string(
    "guidance_schedule", "constant", "constant, or linear or cosine: from 1 at t=0 to --guidance."
)
_GUIDE_WORKDIR = flags.DEFINE_string(
    "guide_workdir", None, "Autoguidance: a run whose weaker model guides, instead of no class."
)
_GUIDE_STEP = flags.DEFINE_integer(
    "guide_step", None, "Autoguidance: checkpoint of the guide, in --guide_workdir or --workdir."
)
_IMAGE_SIZE = flags.DEFINE_string(
    "image_size", None, "HxW in pixels, such as 256x384; by default the size of training."
)
_RESOLUTION_ADJUSTMENT = flags.DEFINE_string(
    "resolution_adjustment",
    None,
    "none (the default), paper or released: how much further deformable blocks reach in larger "
    "images.",
)
_SEED = flags.DEFINE_integer(
    "seed", None, "Image i depends on it and on i alone; by default the config's.", lower_bound=0
)
_COMPARE = flags.DEFINE_string(
    "compare", None, "A strip across steps, samplers, image_size or resolution_adjustment."
)
_OUT = flags.DEFINE_string(
    "out", None, "Output folder; by default one in WORKDIR/samples for these settings."
)
_SAVE_IMAGES = flags.DEFINE_bool("save_images", False, "Write every image as a PNG of its own too.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Images at a time on each device, by default 16.", lower_bound=1
)
_AUTOENCODER = flags.DEFINE_string(
    "autoencoder", None, "Decoder: sd_vae, taesd, taef1 or taef2; by default the config's."
)
_AUTOENCODER_WEIGHTS = flags.DEFINE_string(
    "autoencoder_weights", None, "Its safetensors file, or the folder; by default the config's."
)
command.define_distributed_flags()


def main() -> None:
    command.join_processes()
    # Imported here so that --help and usage errors come at once.
    import jax

    picture = sample()
    if jax.process_index() == 0:
        print(picture)


def sample() -> Path:
    """The path of the picture that the flags ask for."""
    from flowdcn_jax import sampling

    settings = sampling.Settings(
        image_size=_IMAGE_SIZE.value,
        sampler=_SAMPLER.value,
        num_steps=_NUM_STEPS.value,
        last_step=_LAST_STEP.value,
        time_shift=_TIME_SHIFT.value,
        diffusion=_DIFFUSION.value,
        guidance=_GUIDANCE.value,
        guidance_channels=_GUIDANCE_CHANNELS.value,
        guidance_interval=sampling.parse_interval(_GUIDANCE_INTERVAL.value),
        guidance_schedule=_GUIDANCE_SCHEDULE.value,
        resolution_adjustment=_RESOLUTION_ADJUSTMENT.value,
        seed=_SEED.value,
    )
    batch_size = {} if _BATCH_SIZE.value is None else dict(batch_size=_BATCH_SIZE.value)
    request = sampling.Request(
        classes=_CLASSES.value, labels=_LABELS.value, num_images=_NUM_IMAGES.value, **batch_size
    )
    if _COMPARE.value is not None and _SAVE_IMAGES.value:
        raise sampling.SamplingError("save_images is set; a comparison is one picture")
    model = sampling.load_trained(
        _WORKDIR.value,
        step=_STEP.value,
        ema=_EMA.value,
        guide_workdir=_GUIDE_WORKDIR.value,
        guide_step=_GUIDE_STEP.value,
        autoencoder=_AUTOENCODER.value,
        autoencoder_weights=_AUTOENCODER_WEIGHTS.value,
    )
    if _COMPARE.value is not None:
        return sampling.compare_to_png(
            model, settings, request, kind=_COMPARE.value, out=_OUT.value
        )
    return sampling.sample_to_folder(
        model, settings, request, out=_OUT.value, save_images=_SAVE_IMAGES.value
    )


if __name__ == "__main__":
    command.run(main)
