"""What an evaluation can have wrong with it."""

from flowdcn_jax.errors import UserError


class EvaluationError(UserError, ValueError):
    """Images, statistics or options that cannot be used; the message names them."""
