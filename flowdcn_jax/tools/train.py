"""Trains a model: python train.py --config=configs/xl2.py --workdir=DIR [--config.KEY=VALUE ...]

`flowdcn train --config=xl2 --workdir=DIR` does it from any folder.

The same command goes on with a run that was stopped. Several hosts: the same command on each, with
--distributed (SLURM, Kubernetes and cloud TPUs are recognised; elsewhere name the three others).

Exit status: 0 done; 2 bad input; 75 stopped as asked (SIGTERM, SIGHUP, Ctrl-C) or by what may pass:
the same command goes on; 74 a disk is full: make room first.
"""

from typing import Any

from absl import flags

from flowdcn_jax import command
from flowdcn_jax.config_flag import define_config_flag, overrides
from flowdcn_jax.errors import UserError

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
_INIT_FROM = command.define_path(
    "init_from", "Workdir of another run, with whose weights this one begins, at step 0."
)
_INIT_STEP = flags.DEFINE_integer(
    "init_step", None, "Its checkpoint; the newest by default.", lower_bound=0
)
_INIT_WEIGHTS = flags.DEFINE_string(
    "init_weights",
    None,
    "Which of its weights: ema (by default), another EMA by its name, or params: those that its "
    "training goes on from.",
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
        init_from=_init_from(),
    )
    return 0 if done else command.STOPPED


def _init_from() -> Any:
    """The weights that the flags name; None: none.

    Raises:
        UserError: a flag about them without --init_from.
    """
    from flowdcn_jax.runs.initial_weights import InitFrom

    given = {
        flag.name.removeprefix("init_"): flag.value
        for flag in (_INIT_STEP, _INIT_WEIGHTS)
        if flag.value is not None
    }
    if _INIT_FROM.value is not None:
        return InitFrom(_INIT_FROM.value, **given)
    if given:
        names = ", ".join(f"--init_{name}" for name in given)
        raise UserError(f"{names} given without --init_from; expected it as well")
    return None


if __name__ == "__main__":
    command.run(main)
