"""Which part of an image a block of warps has in shared memory, for kernels that gather rows."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.deformable_conv.group import Group, Share, for_each_tile
from pallas_kernels.deformable_conv.inner_corners import corners_of_points
from pallas_kernels.deformable_conv.point_rows import WORD

COPY_BYTES = 16  # of a thread at a time
FEW_WARPS = 8  # with registers for points of the next tile


class Window(NamedTuple):
    """A part of an image, or all of it; numbers of tokens, which a kernel may have computed."""

    x: object  # of the first token
    y: object
    width: object
    height: object


def window_bytes(bytes_of_rows: int, num_warps: int) -> int:
    """Of shared memory for rows of values, in which warps first tell one another their extents."""
    return max(bytes_of_rows, num_warps * 4 * WORD)


def for_each_tile_with_window(
    group: Group, share: Share, shared, scratch, *, fits: Callable, copy: Callable, visit: Callable
) -> None:
    """Calls visit(tile, words of its points, window, window_is_there) for the warp's tiles.

    copy(window) begins to copy that part of the image to shared memory: all of it if images fit,
    else what the block's points need. Where fits(window) says that that does not fit, visit gets
    None for a window. It calls window_is_there(), which waits, before it reads from the window; all
    it does is done again by warps that have no tile in the first step. `scratch` is of the warp.
    """
    warp, image = group.warp, group.image
    tile = functools.partial(share.tile, warp)

    def each_tile(window, ready):
        def visit_tile(number, words, ready):
            visit(number, words, window, ready)

        ahead = share.steps > 1 and warp.num_warps <= FEW_WARPS
        for_each_tile(
            group.points, share.steps, tile, visit_tile, scratch, ready=ready, ahead=ahead
        )

    def with_window(window):
        copy(window)
        each_tile(window, warp.wait_for_copies)

    if share.whole:
        with_window(Window(0, 0, image.w, image.h))
        return
    window = _window_of_block(group, share, shared, scratch)
    fitting = warp.select(fits(window), warp.constant(1), warp.constant(0))
    warp.when(fitting == 1, lambda _: with_window(window))
    warp.when(fitting == 0, lambda _: each_tile(None, lambda: None))


def _window_of_block(group: Group, share: Share, shared, scratch) -> Window:
    warp, image = group.warp, group.image

    def ends(*extents):
        lows, highs = zip(*extents, strict=True)
        return functools.reduce(jnp.minimum, lows), functools.reduce(jnp.maximum, highs)

    def step(n, extents):
        number, _ = share.tile(warp, n)
        words = group.points.exchange(group.points.load(number), scratch)
        corners = corners_of_points(group, words, group.queries(number))
        points = zip(*[((c.x, c.x), (c.y, c.y)) for c in corners], strict=True)
        return tuple(
            warp.apply(ends, before, *own) for before, own in zip(extents, points, strict=True)
        )

    nothing = tuple((warp.constant(size), warp.constant(0)) for size in (image.w, image.h))
    extents = warp.loop(share.steps, step, nothing)
    place = shared + warp.warp * (4 * WORD)
    numbers = [x for low, high in extents for x in (warp.lowest(low), warp.highest(high))]
    warp.store_shared(place, *numbers)
    warp.wait_for_block()
    found = [warp.load_shared_words(shared, 4, n * 4 * WORD) for n in range(warp.num_warps)]
    x, y = (warp.apply(ends, *(numbers[n : n + 2] for numbers in found)) for n in (0, 2))
    warp.wait_for_block()
    return Window(x[0], y[0], x[1] - x[0] + 2, y[1] - y[0] + 2)
