"""Kernels that gather rows of values into products of the tensor cores, for NVIDIA's Hopper.

A block has a group's image in shared memory. A warp takes 32 queries, of which each lane evaluates
one's sampling points. Then all lanes load the rows of the four tokens around a point in one
instruction, straight into what a product wants of each lane: nothing is unpacked, and sums are the
tensor cores'.

A register holds two neighbouring channels, where a product has two neighbours of its sum:

- The forward's sums go over four tokens and the two channels of a word. A word has columns of its
  own, one for each channel, in which the tokens' weights stand beside zeros. Four queries' weights
  are in one matrix, and of the columns those are kept whose weights belong to the rows.
- The points' gradients are sums over channels, of the rows around two points times d out of four
  queries, of which again one's is kept.

What is thrown away costs nothing: the tensor cores have the time. Nothing is shared between
queries, so every run gives the same bits.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv.group import (
    Extents,
    Group,
    for_each_tile,
    point_gradient_structs,
)
from pallas_kernels.deformable_conv.image import Image, image_of
from pallas_kernels.deformable_conv.inner_corners import (
    corners_of_points,
    gradients_of_points,
    moving_corners_of_points,
)
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES, launch
from pallas_kernels.deformable_conv.point_rows import QUERIES, WORD, exchange_bytes
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.token_rows import (
    CHANNELS,
    CODES_BYTES,
    PIECE,
    REST,
    Lane,
    Layout,
    TokenRows,
    copy_image,
)
from pallas_kernels.deformable_conv.warp import Warp

MAX_POINTS = 9  # whose corners fit into registers
MAX_WARPS = 8  # for which images are asked to leave room
AT_A_TIME = 4  # queries
PENDING = 1  # stores of the gradients' products; more take more registers
WEIGHTS_BYTES = 8 * QUERIES  # four weights of 16 bits each
PRODUCTS_BYTES = 4 * WORD * QUERIES  # of a point
MAX_OWN_BYTES = MAX_POINTS * (PRODUCTS_BYTES + CODES_BYTES)


def why_not(h: int, w: int, channels: int, num_points: int, dtype) -> str | None:
    """Why the kernels can't take such values and points; None if they can."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"the values are {jnp.dtype(dtype).name}; expected bfloat16 or float16"
    if min(h, w) < 2:
        return f"the images are {h} x {w}; expected two rows and two columns at least"
    if channels not in (CHANNELS, CHANNELS + REST):
        return f"there are {channels} channels; expected {CHANNELS} or {CHANNELS + REST}"
    if num_points > MAX_POINTS:
        return f"there are {num_points} points; expected at most {MAX_POINTS}"
    image = Image(1, h, w, channels, MAX_POINTS, jnp.dtype(dtype), "zeros")
    if Layout(image, MAX_WARPS, MAX_OWN_BYTES).shared_bytes > MAX_SHARED_BYTES:
        return f"the images are {h} x {w}; expected such that they fit into shared memory"
    return None


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
    tables = image.num_points * (CODES_BYTES + WEIGHTS_BYTES)
    layout = Layout(image, num_warps, max(tables, exchange_bytes(points)))
    (out,) = launch(
        functools.partial(_forward_kernel, layout=layout),
        name="deformable_forward_row_products",
        num_blocks=values.shape[0] * image.groups,
        shared_bytes=layout.shared_bytes,
        points=points,
        inputs=(values,),
        outputs=(jax.ShapeDtypeStruct(values.shape, values.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return out


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
    """The tangent of `forward`'s result, where values and points move by d_values and d_points."""
    image = image_of(values, points, h, w, boundary)
    layout = tangent_layout(image, num_warps, exchange_bytes(points), exchange_bytes(d_points))
    (out,) = launch(
        functools.partial(_forward_kernel, layout=layout),
        name="deformable_tangent_row_products",
        num_blocks=values.shape[0] * image.groups,
        shared_bytes=layout.shared_bytes,
        points=points,
        tangent=d_points,
        inputs=(values, d_values),
        outputs=(jax.ShapeDtypeStruct(values.shape, values.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return out


def tangent_layout(image: Image, num_warps: int, *exchanged: int) -> Layout:
    tables = image.num_points * (CODES_BYTES + 2 * WEIGHTS_BYTES)
    return Layout(image, num_warps, max((tables, *exchanged)), sources=2)


def point_gradients(
    values,
    points,
    d_out,
    *,
    h: int,
    w: int,
    dtypes: tuple,
    boundary: str,
    num_warps: int,
    interpret: bool,
) -> tuple[list[jax.Array], Extents]:
    """The gradients of points.per_query, in `dtypes`; values and d_out are [B, tokens, G, C].

    And where the sampling points lie, for `sparse_transpose.values_gradient`.
    """
    image = image_of(values, points, h, w, boundary)
    pitch = 4 * WORD * (image.num_points | 1)
    table = max(pitch * QUERIES, exchange_bytes(points))
    layout = Layout(image, num_warps, table + image.num_points * CODES_BYTES)
    *gradients, lowest, highest = launch(
        functools.partial(_point_gradients_kernel, layout=layout, pitch=pitch, table=table),
        name="deformable_point_gradients_row_products",
        num_blocks=values.shape[0] * image.groups,
        shared_bytes=layout.shared_bytes,
        points=points,
        inputs=(values, d_out),
        outputs=point_gradient_structs(points, dtypes, image),
        num_warps=num_warps,
        interpret=interpret,
    )
    return gradients, Extents(lowest, highest)


# --- kernels -------------------------------------------------------------------------------------


def _forward_kernel(warp: Warp, points, shared, *refs, layout: Layout):
    """Of values and the output; for the tangent, points and values are a pair each."""
    *values, out = refs
    image, moves = layout.image, layout.sources == 2
    points, d_points = points if moves else (points, None)
    group = Group(warp, image, warp.block, points)
    along = [group.rows_of(d_points)] if moves else []
    # Lane 4 i + j reads the four words of a piece of token j: the left sides of two products have
    # words 0 and 1, or 2 and 3, in rows i and i + 8. Of the right side it has column i: of query
    # i // 2, one channel of a word. Of the products it gets the same words, of query j. The
    # tangent's products sum over the tokens of both arrays, values by the weights' tangents first.
    i, j = warp.lane >> 2, warp.lane & 3
    lane = Lane(right=j & 1, below=j >> 1, piece=(i >> 1) + (i & 1) * 4, word=i & 3)
    rows = [
        TokenRows(warp, layout, shared + n * layout.tokens_bytes, lane)
        for n in range(layout.sources)
    ]
    codes = scratch = layout.scratch(shared, warp)
    weights = codes + image.num_points * CODES_BYTES
    weights_bytes = layout.sources * WEIGHTS_BYTES  # of a point
    own_weight = weights + (i >> 1) * 8 + j * 2
    shift = (i & 1) * 16
    # Of the rest, which is four words, lanes read two queries' at a time.
    second = (i >> 2) == 1
    odd, high = (j & 1) == 1, (j >> 1) == 1
    gets_rest = (i >> 2) == (j & 1)

    def of_query(numbers: list):
        """Of numbers for four queries, the one for query j."""
        low, top = (warp.select(odd, numbers[n + 1], numbers[n]) for n in (0, 2))
        return warp.select(high, top, low)

    def corners_and_weights(words: list, queries) -> list:
        """Of each point: where it is, and its weights for each source."""
        if not moves:
            return [(x, [x.weights]) for x in corners_of_points(group, *words, queries)]
        words, d_words = words
        found = moving_corners_of_points(group, words, *along, d_words, queries)
        return [(x, [d_weights, x.weights]) for x, d_weights in found]

    def visit(tile, *words_and_is_there):
        *words, is_there = words_and_is_there
        queries = group.queries(tile)
        for k, (corners, found) in enumerate(corners_and_weights(words, queries)):
            rows[0].store_code(codes + (k * CODES_BYTES), corners)
            for n, w in enumerate(found):
                place = weights + (k * weights_bytes + n * WEIGHTS_BYTES) + warp.lane * 8
                warp.store_shared(place, *(warp.pack(*w[n : n + 2], image.dtype) for n in (0, 2)))
        warp.wait_for_lanes()
        is_there()

        def four_queries(step, _):
            zeros = [warp.constant(0.0)] * 4
            totals = [[zeros] * 2 for _ in range(AT_A_TIME)]
            rest = zeros
            own = own_weight + step * (AT_A_TIME * 8)
            for k in range(image.num_points):
                found = rows[0].load_codes(codes, step * AT_A_TIME, k * CODES_BYTES)
                right = [
                    warp.load_shared_half(own, k * weights_bytes + n * WEIGHTS_BYTES) << shift
                    for n in range(layout.sources)
                ]
                pieces = [[x.load(code) for x in rows] for code in found]
                for q, half in itertools.product(range(AT_A_TIME), range(2)):
                    left = [w for x in pieces[q] for w in x[2 * half : 2 * half + 2]]
                    totals[q][half] = warp.add_product(totals[q][half], left, right, image.dtype)
                if layout.rest:
                    own_codes = [warp.select(second, found[n + 1], found[n]) for n in (0, 2)]
                    left = [x.load_rest(code, 1)[0] for x in rows for code in own_codes]
                    rest = warp.add_product(rest, left, right, image.dtype)
            token = queries.first + step * AT_A_TIME + j
            exists = None if queries.exists is None else token < image.tokens
            channel = group.channel(token)
            numbers = [
                of_query([totals[q][half][n] for q in range(AT_A_TIME)])
                for half in range(2)
                for n in range(4)
            ]
            found = [warp.pack(*numbers[n : n + 2], image.dtype) for n in range(0, 8, 2)]
            warp.store_words(out, channel + lane.piece * PIECE, found, mask=exists)
            if layout.rest:
                pair = (warp.select(high, rest[n + 2], rest[n]) for n in range(2))
                word = warp.pack(*pair, image.dtype)
                mask = gets_rest if exists is None else gets_rest & exists
                warp.store_words(out, channel + lane.word * 2 + CHANNELS, [word], mask=mask)

        warp.loop(QUERIES // AT_A_TIME, four_queries)
        warp.wait_for_lanes()

    def copy():
        for n, ref in enumerate(values):
            copy_image(group, layout, shared + n * layout.tokens_bytes, ref)

    for_each_tile(group, copy, visit, scratch, *along)


def _point_gradients_kernel(
    warp: Warp,
    points: Points,
    shared,
    values,
    d_out,
    *outputs,
    layout: Layout,
    pitch: int,
    table: int,
):
    image = layout.image
    gradients, extents_refs = outputs[:-2], Extents(*outputs[-2:])
    group = Group(warp, image, warp.block, points)
    # Lane 4 i + j reads the four words of pieces 2 j and 2 j + 1 of token i of the eight around two
    # points: the left side of a product has words 0 and 1 in rows i and i + 8, and beside them
    # words 2 and 3. Of the right side it has column i: of one of four queries, words 0 and 2 of
    # d out, or 1 and 3. Of the product it gets those of rows i and i + 8 and of both columns of
    # query j: two of the four are parts of the token's product.
    i, j = warp.lane >> 2, warp.lane & 3
    second = (i >> 2) == 1  # of two points
    lane = Lane(right=i & 1, below=i >> 1 & 1, piece=j * 2, word=(j & 1) * 2)
    rows = TokenRows(warp, layout, shared, lane)
    query, odd_words = i >> 1, (i & 1) == 1
    scratch = layout.scratch(shared, warp)
    codes = scratch + table
    own_product = scratch + j * pitch + i * WORD
    odd, high = (j & 1) == 1, (j >> 1) == 1
    gets_single = (i >> 2) == (j & 1)
    num_points = image.num_points

    def load_d_out(queries, step):
        token = group.inside(queries.first + step * AT_A_TIME + query)
        channel = group.channel(token)
        pieces = [warp.load_words(d_out, channel + (j * 2 + n) * PIECE, 4) for n in range(2)]
        rest = []
        if layout.rest:
            rest = warp.load_words(d_out, channel + (j & 1) * (REST // 2) + CHANNELS, 2)
        return pieces, rest

    def right_sides(loaded):
        pieces, rest = loaded
        pieces = [[warp.select(odd_words, x[n + 1], x[n]) for n in (0, 2)] for x in pieces]
        if rest:
            word = warp.select(odd_words, rest[1], rest[0])
            rest = [warp.select(j < 2, word, warp.constant(0))]
        return pieces, rest

    def products_of(code, right):
        """Of the tokens of a code with d out of all queries."""
        pieces, rest = right
        total = [warp.constant(0.0)] * 4
        for n, words in enumerate(pieces):
            total = warp.add_product(total, rows.load(code, n), words, image.dtype)
        if layout.rest:
            total = warp.add_product(total, rows.load_rest(code, 2), rest, image.dtype)
        return total[0] + total[3]

    def store(pending: list, left: int):
        """Stores products until so many are left."""
        while len(pending) > left:
            mask, address, product = pending.pop(0)
            if mask is None:
                warp.store_shared(address, product)
            else:
                warp.store_shared_where(mask, address, product)

    def visit(tile, words, is_there):
        queries = group.queries(tile)
        corners = corners_of_points(group, words, queries)
        extents = group.extents([x.y * image.w + x.x for x in corners])
        group.store_extents(extents, tile, extents_refs)
        for k, x in enumerate(corners):
            rows.store_code(codes + (k * CODES_BYTES), x)
        warp.wait_for_lanes()
        is_there()

        def four_queries(step, loaded):
            last = QUERIES // AT_A_TIME - 1
            following = warp.select(step < last, step + 1, warp.constant(last))
            following = load_d_out(queries, following)
            right = right_sides(loaded)
            place = own_product + step * (AT_A_TIME * pitch)
            first = step * AT_A_TIME
            own_codes = codes + (i >> 2) * CODES_BYTES
            pending = []
            for k in range(0, num_points, 2):
                if k + 1 < num_points:
                    found = rows.load_codes(own_codes, first, k * CODES_BYTES)
                    a, b, c, d = (products_of(code, right) for code in found)
                    low, top = warp.select(odd, b, a), warp.select(odd, d, c)
                    address, mask = place + k * (4 * WORD), None
                else:  # two queries' last points at a time
                    found = rows.load_codes(codes, first, k * CODES_BYTES)
                    found = [warp.select(second, found[n + 1], found[n]) for n in (0, 2)]
                    low, top = (products_of(code, right) for code in found)
                    address, mask = place - (i & 4) * WORD + k * (4 * WORD), gets_single
                pending.append((mask, address, warp.select(high, top, low)))
                store(pending, left=PENDING)  # not at once: later loads will have to wait
            store(pending, left=0)
            return following

        warp.loop(QUERIES // AT_A_TIME, four_queries, load_d_out(queries, warp.constant(0)))
        warp.wait_for_lanes()
        row = scratch + warp.lane * pitch
        products = []
        for k in range(num_points):
            products.append(warp.load_shared(row + k * (4 * WORD), 4))
        pulled = gradients_of_points(group, words, queries, products)
        group.points.store_gradients(gradients, tile, pulled, scratch)

    copy = functools.partial(copy_image, group, layout, shared, values)
    for_each_tile(group, copy, visit, scratch)
