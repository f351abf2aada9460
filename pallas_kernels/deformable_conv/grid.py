"""An image's tokens in tiles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Grid(NamedTuple):
    """The tokens of an image, in tiles; tiles at the right and bottom border may hang over."""

    h: int
    w: int
    tile_h: int  # a power of two
    tile_w: int  # likewise

    @property
    def tiles_x(self) -> int:
        return -(-self.w // self.tile_w)

    @property
    def tiles_y(self) -> int:
        return -(-self.h // self.tile_h)

    @property
    def tiles(self) -> int:
        return self.tiles_x * self.tiles_y

    @property
    def tile_size(self) -> int:
        return self.tile_h * self.tile_w

    def first(self, number):
        """(x, y) of the first token of a tile, int32."""
        x, y = remainder(number, self.tiles_x), quotient(number, self.tiles_x)
        return x * self.tile_w, y * self.tile_h


# For numbers that are not negative; jnp's own take care of signs.


def quotient(number, divisor: int):
    return number if divisor == 1 else jax.lax.div(number, jnp.int32(divisor))


def remainder(number, divisor: int):
    return jnp.zeros_like(number) if divisor == 1 else jax.lax.rem(number, jnp.int32(divisor))
