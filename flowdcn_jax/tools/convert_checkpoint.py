"""Converts published weights to a workdir, and a workdir's weights to the authors' names.

    python -m flowdcn_jax.tools.convert_checkpoint --source=FlowDCN-XL-2M-R256.pth \\
        --config=configs/xl2.py --workdir=DIR
    python -m flowdcn_jax.tools.convert_checkpoint --workdir=DIR --export=FILE.safetensors

The source is one of FlowDCN's two forms (a state dict, or a Lightning checkpoint), of SiT's (a
state dict, or its training script's checkpoint), or safetensors of any of them. sample.py,
flowdcn_jax.load_model and train.py read the workdir. PyTorch files need PyTorch, and are read for
weights alone: code in them is never run.
"""

import shlex

from absl import flags

from flowdcn_jax import command, config_flag
from flowdcn_jax.errors import UserError

_CONFIG = config_flag.define_config_flag()
_SOURCE = command.define_path("source", "Weights to convert: .pth, .pt, .ckpt, .safetensors.")
_WORKDIR = command.define_path("workdir", "Folder of the run: to write, or to export.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", "ema", ["ema", "model"], "Which, where there are both: averaged, or as trained."
)
_BOUNDARY = flags.DEFINE_enum(
    "boundary",
    None,
    ["truncate", "zeros"],
    "How FlowDCN's borders are sampled; by default what --export wrote beside the tensors, or "
    "truncate, as published weights were trained.",
)
_EXPORT = command.define_path("export", "safetensors file to write from --workdir.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "float16"],
    "Of the parameters in that file: float16 is half as large, and has lost digits.",
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to export; the newest by default.")


def main() -> None:
    _check_flags()
    import jax

    from flowdcn_jax import published_weights

    jax.config.update("jax_platforms", "cpu")  # files in, files out
    published_weights.give_back_freed_arrays()
    if _EXPORT.value:
        step = published_weights.export(
            _WORKDIR.value,
            _EXPORT.value,
            weights=_WEIGHTS.value,
            step=_STEP.value,
            dtype=_DTYPE.value,
            progress=True,
        )
        print(f"{_EXPORT.value}: the {_WEIGHTS.value} weights of step {step}")
        return
    config = _CONFIG.value
    changed = _fit_config(config)
    published_weights.warn_of_dit(flags.FLAGS["config"].config_filename)
    origin = published_weights.convert(
        _SOURCE.value,
        config,
        _WORKDIR.value,
        weights=_WEIGHTS.value,
        boundary=_BOUNDARY.value,
        progress=True,
    )
    if "boundary" in origin:
        changed["model.boundary"] = origin["boundary"]
    which = "its only weights" if origin["weights"] == "only" else f"its {_WEIGHTS.value} weights"
    print(f"{_WORKDIR.value}: {origin['file']}, a {origin['format']}, {which}")
    decoder = ["--autoencoder=sd_vae", "--autoencoder_weights=sd-vae-ft-ema"]
    latents = config.autoencoder.name == "preview" and config.model.in_channels == 4
    _print_command("to sample:    ", "sample.py", *(decoder if latents else []))
    keys = [f"--config.{key}={value}" for key, value in (config_flag.overrides() | changed).items()]
    file = flags.FLAGS["config"].config_filename
    _print_command("to fine-tune: ", "train.py", f"--config={file}", *keys)


def _print_command(title: str, *arguments: str) -> None:
    print(title + shlex.join(["python", *arguments, f"--workdir={_WORKDIR.value}"]))


def _fit_config(config) -> dict:
    """Sets what follows from the weights and was not asked for; returns it by key."""
    from flowdcn_jax.config import check_classes, check_keys

    check_keys(config)
    changed = {}
    # The default classes are ImageNet's.
    if "sampling.classes" in config_flag.overrides():
        check_classes(config)
    elif max(config.sampling.classes, default=-1) >= config.model.num_classes:
        changed["sampling.classes"] = ()
    config.update_from_flattened_dict(changed)
    return changed


def _check_flags() -> None:
    """Raises a UserError unless the flags are those of one of the two directions."""
    if bool(_SOURCE.value) == bool(_EXPORT.value):
        raise UserError("give either --source, to convert, or --export, to write")
    for flag in (_WORKDIR, _CONFIG) if _SOURCE.value else (_WORKDIR,):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing")


if __name__ == "__main__":
    command.run(main)
