"""How the kernels read and write rows of channels, by Pallas' Triton."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

LEAST_PIECE = 128  # channels


class Rows:
    """Some tokens of references [T,D], channels in pieces, which are powers of two for Triton.

    A piece takes no more than one load of 16 bytes a thread, of 16-bit channels. What hangs over
    the last channel or token reads as zero, and is not written.

    Args:
        width: D.
        tokens: their numbers, int32 [R,1].
        inside: which of them there are, bool [R,1]; None if all.
        warps: of a program.
    """

    def __init__(self, width: int, tokens, inside, *, warps: int):
        self.tokens, self.inside, self.width = tokens, inside, width
        self.pieces = pieces(width, warps)

    def load(self, reference) -> list[jax.Array]:
        """The rows of a reference, a block [R, size] for each piece, in its dtype."""
        blocks = []
        for piece in self.pieces:
            index, mask = self._place(*piece)
            other = None if mask is None else 0.0
            blocks.append(plgpu.load(reference.at[index], mask=mask, other=other))
        return blocks

    def store(self, reference, blocks: list[jax.Array]) -> None:
        """Writes blocks such as `load` gives, in the reference's dtype."""
        for piece, block in zip(self.pieces, blocks, strict=True):
            index, mask = self._place(*piece)
            plgpu.store(reference.at[index], block.astype(reference.dtype), mask=mask)

    def less_mean(self, blocks: list[jax.Array]) -> list[jax.Array]:
        """float32 blocks without their mean over the channels."""
        mean, out = self.mean(blocks), []
        for (first, size), block in zip(self.pieces, blocks, strict=True):
            block = block - mean
            if first + size > self.width:
                block = jnp.where(_channels(first, size) < self.width, block, 0.0)
            out.append(block)
        return out

    def mean(self, blocks: list[jax.Array]) -> jax.Array:
        """The mean over the channels, [R,1]."""
        total = sum(jnp.sum(block, axis=1, keepdims=True) for block in blocks)
        return total / self.width

    def _place(self, first: int, size: int):
        index = tuple(jnp.broadcast_arrays(self.tokens, _channels(first, size)))
        mask = None if self.inside is None else jnp.broadcast_to(self.inside, index[0].shape)
        if first + size > self.width:
            there = index[1] < self.width
            mask = there if mask is None else mask & there
        return index, mask


def pieces(width: int, warps: int) -> list[tuple[int, int]]:
    """(first channel, number of channels) of each piece; the last may hang over."""
    found, first = [], 0
    while first < width:
        size = 256 * warps
        while size > LEAST_PIECE and first + size > width:
            size //= 2
        found.append((first, size))
        first += size
    return found


def load_vector(reference, warps: int) -> list[jax.Array]:
    """A reference [D] as blocks [1, size], float32."""
    (width,), blocks = reference.shape, []
    for first, size in pieces(width, warps):
        channels = _channels(first, size)[0]
        mask = None if first + size <= width else channels < width
        other = None if mask is None else 0.0
        blocks.append(plgpu.load(reference.at[channels], mask=mask, other=other)[None, :])
    return [block.astype(jnp.float32) for block in blocks]


def store_vector(reference, blocks: list[jax.Array], warps: int) -> None:
    """Writes blocks [size] to a reference [D]."""
    (width,) = reference.shape
    for (first, size), block in zip(pieces(width, warps), blocks, strict=True):
        channels = _channels(first, size)[0]
        mask = None if first + size <= width else channels < width
        plgpu.store(reference.at[channels], block, mask=mask)


def _channels(first: int, size: int) -> jax.Array:
    return first + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
