"""What a data set, or the request for one, can have wrong with it."""

from flowdcn_jax.errors import UserError


class DataError(UserError, ValueError):
    """An option out of range, or a file that does not hold what it should."""


class DataNotFoundError(UserError, FileNotFoundError):
    """A data set that is not prepared, or a file that is missing; the message says what to do."""


class DataExistsError(UserError, FileExistsError):
    """A data set that would be overwritten."""
