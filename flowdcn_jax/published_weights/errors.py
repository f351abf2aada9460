"""What is wrong with weights from elsewhere."""

from flowdcn_jax.errors import UserError


class PublishedWeightsError(UserError, ValueError):
    """Weights that cannot be used; the message names the file, tensor or folder and the remedy."""
