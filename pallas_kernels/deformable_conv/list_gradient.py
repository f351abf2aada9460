"""The gradient of the values from sorted sampling points, for NVIDIA's Hopper.

The gradient of a token is the sum of the rows of d out of the points around it, times their
weights. As `point_lists.py` has sorted the points by the tokens around them, four points at a time
have the same four tokens, and a row is loaded once for all of these (`list_sums.py`), from wherever
it is in memory: offsets may be of any size.

A warp has a strip of the image, a few tokens wide, and goes through its rows of tokens, in a row
from left to right: the sums of two neighbours in two rows are in its registers. What a token of the
lower row has got waits in shared memory until the next row of points adds to it. Nothing is added
up in an order that changes from run to run.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import point_lists
from pallas_kernels.deformable_conv.image import Image, image_of
from pallas_kernels.deformable_conv.launch import launch
from pallas_kernels.deformable_conv.list_sums import STRIP, Ring, Strip, sums_of
from pallas_kernels.deformable_conv.point_rows import WORD
from pallas_kernels.deformable_conv.warp import LANES, Warp

MAX_CHANNELS = 128  # whose sums fit into registers
MAX_POINTS = 9  # that fit into registers


def why_not(h: int, w: int, channels: int, num_points: int, dtype) -> str | None:
    """Why the kernels can't take such values and points; None if they can.

    Lists may take as much memory as the values, but no more.
    """
    if channels % 8 or channels > MAX_CHANNELS:
        return f"there are {channels} channels; expected a multiple of 8 to {MAX_CHANNELS}"
    if num_points > MAX_POINTS:
        return f"there are {num_points} points; expected at most {MAX_POINTS}"
    if reason := point_lists.why_not(h, w, num_points):
        return reason
    list_bytes = point_lists.num_bytes(h * w, num_points, dtype)
    image_bytes = h * w * channels * jnp.dtype(dtype).itemsize
    if list_bytes > image_bytes:
        return (
            f"there are {channels} channels; expected more, as a list of points takes {list_bytes} "
            f"bytes, and an image {image_bytes}"
        )
    return None


def values_gradient(points, d_out, *, h: int, w: int, boundary: str, num_warps: int, interpret):
    """The gradient of the values, like d_out [B, tokens, G, C], of points with flattened tokens."""
    image = image_of(d_out, points, h, w, boundary)
    lists = point_lists.sort(d_out, points, h=h, w=w, boundary=boundary, interpret=interpret)
    return of_lists(lists, d_out, image, num_warps=num_warps, interpret=interpret)


def of_lists(lists: point_lists.Lists, d_out, image: Image, *, num_warps: int, interpret: bool):
    """The same, of sorted points."""
    strips = d_out.shape[0] * image.groups * _strips(image)
    (d_values,) = launch(
        functools.partial(_kernel, image=image, strips=strips),
        name="deformable_values_gradient_lists",
        num_blocks=-(-strips // num_warps),
        shared_bytes=num_warps * _own_bytes(image),
        points=(),
        inputs=(*lists, d_out),
        outputs=(jax.ShapeDtypeStruct(d_out.shape, d_out.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return d_values


def _strips(image: Image) -> int:
    return -(-image.w // STRIP)


def _own_bytes(image: Image) -> int:
    """Of a warp's shared memory."""
    sums = sums_of(image)
    return sums.shared_bytes(image) + 2 * Ring(image, sums.AHEAD).bytes


def _kernel(
    warp: Warp, points, shared, queries, weights, starts, d_out, d_values, *, image: Image, strips
):
    del points
    number = warp.block * warp.num_warps + warp.warp
    sums_bytes = sums_of(image).shared_bytes(image)
    own_image, first_x = number // _strips(image), number % _strips(image) * STRIP
    first_entry = own_image // image.groups * (image.tokens * image.groups)
    first_entry = first_entry + own_image % image.groups
    strip = Strip(image, first_x, first_entry, shared + warp.warp * _own_bytes(image))
    ahead = sums_of(image).AHEAD
    ring = Ring(image, ahead)
    sums_of_strip = sums_of(image)(warp, strip, ring)
    own_points = own_image * point_lists.capacity(image.tokens, image.num_points)
    own_starts = own_image * (image.tokens + 1)

    def starts_of_row(y):
        """Lane n has where the points of the token n - 1 of the strip begin, in row y; the last of
        them, where those of the token before end."""
        x = first_x + warp.lane - 1
        x = warp.apply(lambda x: jnp.minimum(jnp.maximum(x, 0), image.w), x)
        y = warp.select(y < image.h, y, warp.constant(image.h - 1))
        return warp.load_words(starts, own_starts + y * image.w + x, 1)[0]

    def ends(starts):
        """Of a row: the first four, the one after the last, how often `ahead` of them are taken."""
        first, after = (warp.shuffle(starts, warp.constant(n)) for n in (0, STRIP + 1))
        count = (after - first + (ahead - 1)) // ahead
        return first, after, warp.select(count < 1, warp.constant(1), count)

    def load_query(four):
        """Lane n has the query of the n-th point from number `four`."""
        point = warp.select(warp.lane < ring.points, warp.lane, warp.constant(0))
        return warp.load_half(queries, four * point_lists.FOUR + own_points + point)

    def copy(place, query, four):
        ring.copy(warp, place, strip, d_out, weights, query, four * point_lists.FOUR + own_points)

    def visit_row(y, carry):
        starts_of_rows, loaded = carry
        row_starts = starts_of_rows[0]
        (first, after, count), next_row, after_next = map(ends, starts_of_rows)
        starts_of_rows = (*starts_of_rows[1:], starts_of_row(y + 3))
        is_start = warp.lane < STRIP + 1

        def finish(until, x, sums):
            return warp.loop(
                until - x, lambda n, sums: sums_of_strip.finish(x + n, y, sums, d_values), sums
            )

        def visit_some(n, carry):
            """Adds up what is at `place`, while what belongs to the queries is copied to `other`
            and the queries after these are loaded."""
            place, other, query, four, x, sums = carry
            warp.wait_for_own_copies()
            copy(other, query, four)
            left = count - n
            # Two further on, which may be in one of the next two rows.
            beyond = warp.select(next_row[2] < 2, after_next[0], next_row[0] + ahead)
            beyond = warp.select(left < 2, beyond, next_row[0])
            beyond = warp.select(left < 3, beyond, first + (n + 2) * ahead)
            query = load_query(beyond)
            for m in range(ahead):
                four = first + n * ahead + m

                def visit(carry, m=m, four=four):
                    x, sums = carry
                    begun = warp.ballot((row_starts < four + 1) & is_start)
                    own_x = first_x - 2 + warp.popcount(begun)
                    return own_x, sums_of_strip.add(finish(own_x, x, sums), place, m)

                x, sums = warp.when(four < after, visit, (x, sums))
            return other, place, query, beyond, x, sums

        carry = *loaded, first_x - 1, sums_of_strip.begin_row(y)
        *loaded, x, sums = warp.loop(count, visit_some, carry)
        finish(first_x + STRIP, x, sums)
        return starts_of_rows, tuple(loaded)

    def visit_strip(_):
        def clear(n, _):
            warp.store_shared(strip.shared + (n * LANES + warp.lane) * WORD, warp.constant(0.0))

        warp.loop(sums_bytes // (LANES * WORD), clear)
        starts_of_rows = tuple(starts_of_row(warp.constant(y)) for y in range(3))
        row, next_row = map(ends, starts_of_rows[:2])
        place = strip.shared + sums_bytes
        copy(place, load_query(row[0]), row[0])
        four = warp.select(row[2] < 2, next_row[0], row[0] + ahead)
        loaded = place, place + ring.bytes, load_query(four), four
        warp.loop(image.h, visit_row, (starts_of_rows, loaded))
        warp.wait_for_own_copies()

    warp.when(number < strips, visit_strip)
