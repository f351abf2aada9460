"""Trains a model: python train.py --config=configs/xl2.py --workdir=DIR [--config.KEY=VALUE ...]

`flowdcn train --config=xl2 --workdir=DIR` does it from any folder.

The same command goes on with a run that was stopped. Several hosts: the same command on each, with
--distributed (SLURM, Kubernetes and cloud TPUs are recognised; elsewhere name the three others).

Exit status: 0 done; 2 bad input; 75 stopped as asked (SIGTERM, SIGHUP, Ctrl-C) or by what may pass:
the same command goes on; 74 a disk is full: make room first.
"""

from absl import flags

from flowdcn_jax import command
from flowdcn_jax.config_flag import define_config_flag, overrides

_CONFIG = define_config_flag(required=True)
_WORKDIR = command.define_path(
    "workdir", "Folder of the run: checkpoints, metrics, grids.", required=True
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "End after all checks and compilation; nothing is written."
)
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "Steps of which a trace is written to WORKDIR/profile.", lower_bound=0
)
command.define_device_flags()


def main() -> int:
    command.use_devices()
    # Imported here so that --help and usage errors come at once.
    from flowdcn_jax.evaluation import evaluator
    from flowdcn_jax.sampling import grid_drawer
    from flowdcn_jax.training.loop import train

    done = train(
        _CONFIG.value,
        _WORKDIR.value,
        grid_drawer,
        evaluator,
        changed=overrides(),
        dry_run=_DRY_RUN.value,
        profile_steps=_PROFILE.value,
    )
    return 0 if done else command.STOPPED


if __name__ == "__main__":
    command.run(main)
