"""The --config flag of commands: one line in place of the traceback of what it cannot read."""

from absl import app, flags
from ml_collections import ConfigDict

from flowdcn_jax.errors import ConfigError


def parse_flags(argv: list[str], config: flags.FlagHolder) -> list[str]:
    """absl's parser for a command with a --config; returns the remaining arguments.

    Raises:
        ConfigError: an unknown key, or a file that does not load.
    """
    try:
        remaining = app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # config_flags' form of an unknown key
        cause = error.args[0]  # a KeyError, wrapped
        text = cause.args[0] if isinstance(cause, Exception) else str(cause)
        raise ConfigError("unknown key in --config: " + text.replace("\n", " ")) from error
    flag = flags.FLAGS[config.name]
    if flag.present and not isinstance(config.value, ConfigDict):  # its form of a bad file
        raise ConfigError(
            f"--config={flag.config_filename} cannot be loaded; expected a file such as "
            "configs/s2.py"
        )
    return remaining
