"""Errors that are the caller's to mend."""


class UserError(Exception):
    """A value, file or folder that cannot be used; the message says which, and what was expected.

    The commands print the message alone. Every other exception is a bug, and keeps its traceback.
    """


class ConfigError(UserError, ValueError):
    """A config that cannot be used; the message names the key, its value and what was expected."""
