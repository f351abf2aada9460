"""Converts published weights to a workdir, and a workdir's weights to the authors' names.

    python -m flowdcn_jax.tools.convert_checkpoint --source=FlowDCN-XL-2M-R256.pth \\
        --config=configs/xl2.py --workdir=DIR
    python -m flowdcn_jax.tools.convert_checkpoint --workdir=DIR --export=FILE.safetensors

The source is one of FlowDCN's two forms (a state dict, or a Lightning checkpoint), of SiT's (a
state dict, or its training script's checkpoint), or safetensors of any of them. sample.py,
flowdcn_jax.load_model and train.py read the workdir. PyTorch files need PyTorch, and are read for
weights alone: code in them is never run.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from flowdcn_jax import config_flag
from flowdcn_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_SOURCE = flags.DEFINE_string("source", None, "Weights to convert: .pth, .pt, .ckpt, .safetensors.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: to write, or to export.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", "ema", ["ema", "model"], "Which, where there are both: averaged, or as trained."
)
_EXPORT = flags.DEFINE_string("export", None, "safetensors file to write from --workdir.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to export; the newest by default.")


def main(argv: list[str]) -> int:
    """Returns the exit status: 0 done, 2 bad input."""
    try:
        _check_flags(argv)
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
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
                progress=True,
            )
            print(f"{_EXPORT.value}: the {_WEIGHTS.value} weights of step {step}")
            return 0
        published_weights.warn_of_dit(flags.FLAGS["config"].config_filename)
        origin = published_weights.convert(
            _SOURCE.value, _CONFIG.value, _WORKDIR.value, weights=_WEIGHTS.value, progress=True
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    which = "its only weights" if origin["weights"] == "only" else f"its {_WEIGHTS.value} weights"
    truncates = _CONFIG.value.model.name == "flowdcn"
    boundary = " --config.model.boundary=truncate" if truncates else ""
    print(f"{_WORKDIR.value}: {origin['file']}, a {origin['format']}, {which}")
    print(f"to sample:    python sample.py --workdir={_WORKDIR.value}")
    print(
        f"to fine-tune: python train.py --config={flags.FLAGS['config'].config_filename}{boundary} "
        f"--workdir={_WORKDIR.value}"
    )
    return 0


def _check_flags(argv: list[str]) -> None:
    """Raises a UserError unless the flags are those of one of the two directions."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}")
    if bool(_SOURCE.value) == bool(_EXPORT.value):
        raise UserError("give either --source, to convert, or --export, to write")
    for flag in (_WORKDIR, _CONFIG) if _SOURCE.value else (_WORKDIR,):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing")


def parse_flags(argv: list[str]) -> list[str]:
    try:
        return config_flag.parse_flags(argv, _CONFIG)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
