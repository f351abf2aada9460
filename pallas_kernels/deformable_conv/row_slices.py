"""A forward kernel whose blocks have a slice of an image's channels, for NVIDIA's Hopper.

As in `row_products.py`, rows of values are gathered from shared memory into products of the tensor
cores. There is room for 24 channels of 4096 tokens and more, so points may lie anywhere. All slices
of a group read the same points, which `point_tables.py` evaluates before.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv import point_tables
from pallas_kernels.deformable_conv.image import Image, image_of
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES, launch
from pallas_kernels.deformable_conv.point_rows import WORD
from pallas_kernels.deformable_conv.point_tables import EIGHT
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

MAX_CHANNELS = 128  # more come in parts
MAX_POINTS = 9  # that `point_tables.py` holds in registers
MAX_WARPS = 12  # for which images are asked to leave room
AT_A_TIME = 4  # queries
PIECE = 8  # channels, of 16 bits
PIECE_BYTES = 16
PIECES = 3  # of a token, in a slice
SLICE = PIECES * PIECE
COPIES_AT_A_TIME = 4
# Which bytes of a word with the weights of two points give one of them, beside a zero, to the first
# or to the second of the two channels of another word; `Warp.permute`.
WEIGHT_OF_CHANNEL = ((0x4410, 0x1044), (0x4432, 0x3244))


class Layout(NamedTuple):
    """Shared memory: a slice of all tokens, and for each warp two tables of points.

    A token's pieces follow one another; from a row of the image to the next there are an odd
    multiple of four pieces. So the pieces 0 and 2 of any four tokens around a point are in
    different banks, and so are the pieces 1 of two points that are an odd multiple of two tokens
    apart.
    """

    image: Image
    num_warps: int

    @property
    def slices(self) -> int:
        return -(-self.image.channels // SLICE)

    @property
    def row(self) -> int:
        """Pieces from a row of the image to the next."""
        return (PIECES * self.image.w + 3) // 8 * 8 + 4

    @property
    def slice_bytes(self) -> int:
        return self.row * self.image.h * PIECE_BYTES

    @property
    def table_bytes(self) -> int:
        return point_tables.num_words(self.image.num_points) * WORD

    @property
    def shared_bytes(self) -> int:
        return self.slice_bytes + self.num_warps * 2 * self.table_bytes


def why_not(h: int, w: int, channels: int, num_points: int, dtype) -> str | None:
    """Why the kernel can't take such values and points; None if it can.

    The tables of points may take as much memory as the values, but no more.
    """
    if jnp.dtype(dtype).itemsize != 2:
        return f"the values are {jnp.dtype(dtype).name}; expected bfloat16 or float16"
    if min(h, w) < 2:
        return f"the images are {h} x {w}; expected two rows and two columns at least"
    if channels % PIECE or channels > MAX_CHANNELS:
        return f"there are {channels} channels; expected a multiple of {PIECE} to {MAX_CHANNELS}"
    if num_points > MAX_POINTS:
        return f"there are {num_points} points; expected at most {MAX_POINTS}"
    image = Image(1, h, w, channels, num_points, jnp.dtype(dtype), "zeros")
    layout = Layout(image, MAX_WARPS)
    if layout.shared_bytes > MAX_SHARED_BYTES:
        return f"the images are {h} x {w}; expected such that a slice fits into shared memory"
    tables_bytes = point_tables.num_tables(image.tokens) * layout.table_bytes
    image_bytes = image.tokens * channels * image.dtype.itemsize
    if tables_bytes > image_bytes:
        return (
            f"there are {channels} channels; expected more, as the tables of points take "
            f"{tables_bytes} bytes, and an image {image_bytes}"
        )
    return None


def share_a_multiprocessor(h: int, w: int, num_points: int, dtype, *, num_warps: int) -> bool:
    """Whether two blocks fit into its shared memory."""
    image = Image(1, h, w, SLICE, num_points, jnp.dtype(dtype), "zeros")
    return 2 * Layout(image, num_warps).shared_bytes <= MAX_SHARED_BYTES


def forward(
    values,
    points,
    *,
    h: int,
    w: int,
    boundary: str,
    num_warps: int,
    interpret: bool,
):
    """out [B, tokens, G, C] of values [B, tokens, G, C] and points with flattened tokens."""
    image = image_of(values, points, h, w, boundary)
    layout = Layout(image, num_warps)
    numbers = dict(row=layout.row, step=PIECES)
    tables = point_tables.tables(
        values, points, h=h, w=w, **numbers, boundary=boundary, interpret=interpret
    )
    name = "deformable_forward_row_slices"
    return _launch(name, layout, [*tables, values], values.dtype, interpret)


def tangent(
    values,
    points,
    d_values,
    d_points,
    *,
    h: int,
    w: int,
    boundary: str,
    num_warps: int,
    interpret: bool,
):
    """The tangent of `forward`'s result, where values and points move by d_values and d_points.

    By one kernel after the other; what the first gives is float32, and the second adds to it.
    """
    image = image_of(values, points, h, w, boundary)
    layout = Layout(image, num_warps)
    numbers = dict(row=layout.row, step=PIECES)
    tables, d_tables = point_tables.tables(
        values,
        points,
        h=h,
        w=w,
        **numbers,
        boundary=boundary,
        interpret=interpret,
        tangent=d_points,
    )
    launch = functools.partial(_launch, "deformable_tangent_row_slices", layout)
    part = launch([d_tables, values], jnp.float32, interpret)
    return launch([tables, d_values, part], values.dtype, interpret)


def _launch(name: str, layout: Layout, inputs: list, dtype, interpret: bool) -> jax.Array:
    values, image = inputs[1], layout.image
    (out,) = launch(
        functools.partial(_kernel, layout=layout),
        name=name,
        num_blocks=values.shape[0] * image.groups * layout.slices,
        shared_bytes=layout.shared_bytes,
        points=(),
        inputs=tuple(inputs),
        outputs=(jax.ShapeDtypeStruct(values.shape, dtype),),
        num_warps=layout.num_warps,
        interpret=interpret,
    )
    return out


def _kernel(warp: Warp, points: Points, shared, *refs, layout: Layout):
    """Of tables, values, maybe something to be added, and the output."""
    del points
    image = layout.image
    tables, values, *addend, out = refs
    number = warp.block // layout.slices  # of a group of an image
    first_piece = (warp.block % layout.slices) * PIECES
    first_entry = number // image.groups * (image.tokens * image.groups) + number % image.groups
    num_tables, table_words = point_tables.num_tables(image.tokens), layout.table_bytes // WORD

    def channel(token):
        """Number of the slice's first channel of a token, in arrays [B, tokens, G, C]."""
        return (first_entry + token * image.groups) * image.channels + first_piece * PIECE

    # Lanes 4 i + j read token j of the four around a point. Those of i below 6 have a piece each of
    # one of two points: eight lanes, which load at a time, pieces 0 and 2 of one of them, or the
    # pieces 1 of both. In a second load the two points are those of the queries after these.
    # The words of a piece are the left sides of products, as in `row_products.py`: words 0 and 1,
    # or 2 and 3, in rows i and i + 8. Of the right side a lane has column i: of query i // 2, one
    # channel of a word. Of the products it gets the same words, of query j.
    i, j = warp.lane >> 2, warp.lane & 3
    is_middle = (i >> 2) == 1
    piece = warp.select(is_middle, warp.constant(1), (i & 1) * 2)
    second = warp.select(is_middle, i & 1, i >> 1)
    reads = i < 2 * PIECES
    own_piece = shared + ((j >> 1) * layout.row + (j & 1) * PIECES + piece) * PIECE_BYTES
    own_codes = second * (2 * WORD)
    codes_bytes = point_tables.num_pairs(image.num_points) * point_tables.CODES * WORD
    own_weights = (i >> 1) * (4 * WORD) + j * WORD + codes_bytes
    odd_query, odd_channel = (j & 1) == 1, (i & 1) == 1
    weight_of_channel = [
        warp.select(odd_channel, *map(warp.constant, reversed(two))) for two in WEIGHT_OF_CHANNEL
    ]
    gets = reads & (second == (j >> 1))
    if image.channels % SLICE:
        gets = gets & (first_piece + piece < image.channels // PIECE)

    def copy_table(place, table):
        first, pieces = (number * num_tables + table) * table_words, table_words // 4
        for start in range(0, pieces, LANES):
            n = warp.lane + start
            mask = None if start + LANES <= pieces else n < pieces
            warp.copy_to_shared(place + n * PIECE_BYTES, tables, first + n * 4, mask=mask)

    def four_queries(codes, weights, token):
        totals = [[[warp.constant(0.0)] * 4] * 2 for _ in range(2)]  # of a load, of two words
        for k in range(image.num_points):
            pair, odd = k // 2, k % 2
            if not odd:
                found = warp.load_shared_words(codes, 2, pair * point_tables.CODES * WORD)
                offset = pair * point_tables.WEIGHTS * WORD
                (weight,) = warp.load_shared_words(weights, 1, offset)
            right = [warp.permute(weight, weight_of_channel[odd])]
            for load, word in enumerate(found):
                code = word >> 16 if odd else word & 0xFFFF
                address = code * PIECE_BYTES + own_piece
                words = warp.load_shared_words_where(reads, address, 4)
                totals[load] = [
                    warp.add_product(total, words[n : n + 2], right, image.dtype)
                    for n, total in zip((0, 2), totals[load], strict=True)
                ]
        numbers = [
            warp.select(odd_query, b, a)
            for of_first, of_second in zip(*totals, strict=True)
            for a, b in zip(of_first, of_second, strict=True)
        ]
        mask = gets & (token < image.tokens) if image.tokens % EIGHT else gets
        at = channel(token) + piece * PIECE
        if addend:
            others = _load(warp, addend[0], warp.select(mask, at, warp.constant(0)))
            numbers = [x + y for x, y in zip(numbers, others, strict=True)]
        _store(warp, out, at, numbers, mask)

    def visit(n, places):
        place, other = places
        table = n * warp.num_warps + warp.warp
        warp.wait_for_own_copies()
        following = table + warp.num_warps
        warp.when(following < num_tables, lambda _: copy_table(other, following))

        def step(s, _):
            codes = place + own_codes + s * (AT_A_TIME * WORD)
            weights = place + own_weights + s * (AT_A_TIME * 4 * WORD)
            four_queries(codes, weights, table * EIGHT + s * AT_A_TIME + j)

        warp.loop(EIGHT // AT_A_TIME, step)
        return other, place

    place = shared + layout.slice_bytes + warp.warp * (2 * layout.table_bytes)
    warp.when(warp.warp < num_tables, lambda _: copy_table(place, warp.warp))
    _copy_slice(warp, layout, shared, values, channel, first_piece)
    warp.wait_for_copies()
    count = (warp.warp * -1 + (num_tables - 1 + warp.num_warps)) // warp.num_warps
    warp.loop(count, visit, (place, place + layout.table_bytes))


def _load(warp: Warp, ref, index) -> list:
    """The float32 numbers of a piece."""
    dtype = warp.dtype(ref)
    if dtype.itemsize == WORD:
        words = [x for n in (0, 4) for x in warp.load_words(ref, index + n, 4)]
        return [warp.as_float(x) for x in words]
    return [x for word in warp.load_words(ref, index, 4) for x in warp.unpack(word, dtype)]


def _store(warp: Warp, ref, index, numbers: list, mask) -> None:
    dtype = warp.dtype(ref)
    if dtype.itemsize == WORD:
        for n in (0, 4):
            warp.store_words(ref, index + n, numbers[n : n + 4], mask=mask)
        return
    packed = [warp.pack(*numbers[n : n + 2], dtype) for n in range(0, 8, 2)]
    warp.store_words(ref, index, packed, mask=mask)


def _copy_slice(warp: Warp, layout: Layout, shared, values, channel, first_piece) -> None:
    """Begins to copy a slice of all tokens to shared memory."""
    image = layout.image
    pieces, at_a_time = image.tokens * PIECES, warp.num_warps * LANES * COPIES_AT_A_TIME

    def copy(step, _):
        for n in range(COPIES_AT_A_TIME):
            number = step * at_a_time + (n * warp.num_warps * LANES) + warp.thread
            token, piece = number // PIECES, number % PIECES
            mask = number < pieces if pieces % at_a_time else None
            if image.channels % SLICE:
                exists = first_piece + piece < image.channels // PIECE
                mask = exists if mask is None else mask & exists
            place = (token // image.w) * layout.row + (token % image.w) * PIECES + piece
            channel_of_piece = channel(token) + piece * PIECE
            warp.copy_to_shared(shared + place * PIECE_BYTES, values, channel_of_piece, mask=mask)

    warp.loop(-(-pieces // at_a_time), copy)
