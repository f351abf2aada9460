"""S_max adjustment: how far the deformable blocks reach at a resolution unlike the training's.

A model samples within max_scale (S_max) tokens of each token. On a larger grid of tokens that is a
smaller part of the image, so sampling multiplies max_scale by a factor a block and an axis.

- `"none"`: max_scale as trained.
- `"paper"`: tokens along the axis / tokens along a side in training, in every block, at every t.
- `"released"`: what the authors' sampler does, for larger images only. While t < 0.6, in blocks
  5 ... depth - 5 counted from 0, the smaller of 1 + (0.6 - t) / 0.6 and of the paper's factor;
  never below 1. So it is strongest at t = 0, at most 2, and gone at t = 0.6.
"""

import jax.numpy as jnp
from jax import Array

RESOLUTION_ADJUSTMENTS = ("none", "paper", "released")
RELEASED_END = 0.6  # t from which the released adjustment does nothing
RELEASED_MARGIN = 5  # first adjusted block, and blocks left alone at the end, less one


def max_scale_factor(
    kind: str, t: Array, *, tokens: tuple[int, int], training_tokens: int, depth: int
) -> Array | None:
    """What multiplies max_scale: [depth, 2] float32, (x, y) of each block; None for no change.

    Args:
        kind: one of RESOLUTION_ADJUSTMENTS.
        t: the time, a scalar; it may be traced.
        tokens: (h, w) of the images drawn.
        training_tokens: tokens along a side of the training images.
        depth: number of blocks.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in RESOLUTION_ADJUSTMENTS:
        raise ValueError(
            f"resolution_adjustment is {kind!r}; expected one of "
            f"{', '.join(RESOLUTION_ADJUSTMENTS)}"
        )
    if kind == "none":
        return None
    h, w = tokens
    ratio = jnp.array([w, h], jnp.float32) / training_tokens
    if kind == "paper":
        return jnp.broadcast_to(ratio, (depth, 2))
    strength = jnp.maximum(1 + (RELEASED_END - t) / RELEASED_END, 1)
    adjusted = jnp.minimum(strength, jnp.maximum(ratio, 1))
    block = jnp.arange(depth)[:, None]
    inner = (block >= RELEASED_MARGIN) & (block <= depth - RELEASED_MARGIN)
    return jnp.where(inner, adjusted, 1)
