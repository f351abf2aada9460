"""Trains a model: python train.py --config=configs/xl2.py --workdir=DIR [--config.KEY=VALUE ...]

The same command goes on with a run that was stopped. Several hosts: the same command on each, with
--distributed (SLURM, Kubernetes and cloud TPUs are recognised; elsewhere name the three others).
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from flowdcn_jax import config_flag
from flowdcn_jax.errors import ConfigError

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, grids.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of the run.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    # Imported here so that --help and usage errors come at once.
    import jax

    from flowdcn_jax.errors import UserError
    from flowdcn_jax.training.loop import train

    if _DISTRIBUTED.value:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
        train(_CONFIG.value, _WORKDIR.value)
    except UserError as error:
        sys.exit(f"error: {error}")


def parse_flags(argv: list[str]) -> list[str]:
    try:
        return config_flag.parse_flags(argv, _CONFIG)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
