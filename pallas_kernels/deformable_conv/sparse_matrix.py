"""Kernels that build the interpolation matrix in shared memory, for NVIDIA's Hopper.

The forward is A values, with a row of A for each query and a column for each token; a row has at
most four entries a sampling point. A warp takes 32 queries, one a lane. Each lane adds the weights
of its query's sampling points to its own row of A, in float32, entry by entry: the work does not
grow with the image, and nothing is shared between lanes, so every run gives the same bits. Blocks
of 16 columns that were touched then go through the tensor cores. A window of columns is in shared
memory at a time, the values of a group's image all the time.

The gradients of the points look up entries of d out valuesᵀ, of which the touched blocks are
computed. The gradient of the values is Aᵀ d out: there a block has a window of tokens, and visits
all queries that touch it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_conv.image_block import (
    CHUNK,
    CHUNK_BYTES,
    Image,
    gradients_of_point,
)
from pallas_kernels.deformable_conv.interpolation import BASES, discard_non_finite
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES, launch
from pallas_kernels.deformable_conv.matrix_rows import (
    COLUMNS,
    NOWHERE,
    QUERIES,
    WORD,
    Group,
    Layout,
    Matrix,
    Queries,
    column_blocks,
    for_each_tile,
    has_bit,
    without_zeros,
)
from pallas_kernels.deformable_conv.points import Multiscale, Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

MAX_POINTS = 9  # whose corners fit into registers
MAX_CHANNELS = 80  # whose sums do


def why_not(h: int, w: int, channels: int, num_points: int, dtype) -> str | None:
    """Why the kernels can't take such values and points; None if they can."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"the values are {jnp.dtype(dtype).name}; expected bfloat16 or float16"
    if channels % CHUNK or channels > MAX_CHANNELS:
        return f"there are {channels} channels; expected a multiple of {CHUNK} to {MAX_CHANNELS}"
    if num_points > MAX_POINTS:
        return f"there are {num_points} points; expected at most {MAX_POINTS}"
    return None


def fits(h: int, w: int, channels: int, *, window: int, num_warps: int) -> bool:
    """Whether the forward and the points' gradients find room in shared memory."""
    image = Image(1, h, w, channels, 1, 1, np.dtype(np.float16), "zeros")
    return _layout(image, window, num_warps).shared_bytes <= MAX_SHARED_BYTES


def _layout(image: Image, window: int, num_warps: int) -> Layout:
    """With the image in shared memory if there is room."""
    matrix = Matrix(window, padding=COLUMNS)
    layout = Layout(image, matrix, num_warps, resident=True)
    if layout.shared_bytes > MAX_SHARED_BYTES:
        layout = layout._replace(resident=False)
    return layout


def forward(
    values, points, *, h: int, w: int, boundary: str, window: int, num_warps: int, interpret: bool
):
    """out [B, tokens, G, C] of values [B, tokens, G, C] and points with flattened tokens."""
    image = _image(values, points, h, w, boundary)
    layout = _layout(image, window, num_warps)
    (out,) = launch(
        functools.partial(_forward_kernel, layout=layout),
        name="deformable_forward_sparse_matrix",
        num_blocks=values.shape[0] * image.groups * layout.parts,
        shared_bytes=layout.shared_bytes,
        points=points,
        inputs=(values,),
        outputs=(jax.ShapeDtypeStruct(values.shape, values.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return out


def point_gradients(
    values,
    points,
    d_out,
    *,
    h: int,
    w: int,
    dtypes: tuple,
    boundary: str,
    window: int,
    num_warps: int,
    interpret: bool,
) -> list[jax.Array]:
    """The gradients of points.per_query, in `dtypes`; values and d_out are [B, tokens, G, C]."""
    image = _image(values, points, h, w, boundary)
    layout = _layout(image, window, num_warps)
    return launch(
        functools.partial(_point_gradients_kernel, layout=layout),
        name="deformable_point_gradients_sparse_matrix",
        num_blocks=values.shape[0] * image.groups * layout.parts,
        shared_bytes=layout.shared_bytes,
        points=points,
        inputs=(values, d_out),
        outputs=tuple(
            jax.ShapeDtypeStruct(x.shape, dtype)
            for x, dtype in zip(points.per_query, dtypes, strict=True)
        ),
        num_warps=num_warps,
        interpret=interpret,
    )


def values_gradient(
    points, d_out, *, h: int, w: int, boundary: str, window: int, num_warps: int, interpret: bool
):
    """The gradient of the values, like d_out [B, tokens, G, C]."""
    image = _image(d_out, points, h, w, boundary)
    matrix = Matrix(window, padding=COLUMNS // 2)
    num_windows = -(-column_blocks(image) // window)
    if num_windows <= 2:
        shape = (d_out.shape[0], image.groups, -(-image.tokens // QUERIES))
        touched = jnp.full(shape, -1, jnp.int32)
    else:
        touched = touched_windows(points, h=h, w=w, boundary=boundary, window=window)
    (d_values,) = launch(
        functools.partial(_values_gradient_kernel, image=image, matrix=matrix),
        name="deformable_values_gradient_sparse_matrix",
        num_blocks=d_out.shape[0] * image.groups * num_windows,
        shared_bytes=num_warps * (matrix.bytes + QUERIES * image.pitch + WORD * 4),
        points=points,
        inputs=(d_out, touched),
        outputs=(jax.ShapeDtypeStruct(d_out.shape, d_out.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return d_values


def _image(values, points: Points, h: int, w: int, boundary: str) -> Image:
    groups, channels = values.shape[2:]
    return Image(groups, h, w, channels, 1, points.weights.shape[-1], values.dtype, boundary)


def touched_windows(points: Points, *, h: int, w: int, boundary: str, window: int) -> jax.Array:
    """Bits of the windows (modulo 32) that 32 queries may touch; int32 [B, G, tiles].

    Coordinates may be rounded otherwise here than in the kernels, hence a margin.
    """
    offsets = (points.to_offsets() if isinstance(points, Multiscale) else points).offsets
    batch, tokens, groups = offsets.shape[:3]
    query = jnp.arange(tokens)
    x = offsets[..., 0].astype(jnp.float32) + (query % w).astype(jnp.float32)[:, None, None]
    y = offsets[..., 1].astype(jnp.float32) + (query // w).astype(jnp.float32)[:, None, None]
    x, y = discard_non_finite(x, y)
    base = BASES[boundary]

    def ends(x, size):
        margin = 1e-3
        low, high = jnp.clip(jnp.stack([base(x - margin), base(x + margin) + 1]), -1, size)
        clipped = (jnp.clip(i, 0, size - 1).astype(jnp.int32) for i in (low, high))
        return tuple(clipped)

    bits = 0
    for row in ends(y, h):
        for column in ends(x, w):
            number = (row * w + column) // (window * COLUMNS)
            bits = bits | jnp.left_shift(jnp.int32(1), number & 31)
    tiles = -(-tokens // QUERIES)
    bits = jnp.pad(bits, ((0, 0), (0, tiles * QUERIES - tokens), (0, 0), (0, 0)))
    bits = bits.reshape(batch, tiles, QUERIES, groups, -1)
    bits = jax.lax.reduce(bits, jnp.int32(0), jax.lax.bitwise_or, (2, 4))
    return bits.swapaxes(1, 2)


# --- kernels -------------------------------------------------------------------------------------


def _forward_kernel(warp: Warp, points: Points, shared, values, out, *, layout: Layout):
    image, matrix = layout.image, layout.matrix
    group = Group(warp, image, warp.block // layout.parts, shared, points)
    scratch, stage = layout.matrix_and_stage(shared, warp)
    if layout.resident:
        group.copy_image(values)
    group.clear(scratch, matrix.bytes)
    warp.wait_for_copies()
    # Columns 4 j to 4 j + 3 of a block are entries 2 j, 2 j + 1, 8 + 2 j, 9 + 2 j of a product's
    # sum, so that a lane's four lie side by side.
    in_matrix, matrix_number = warp.lane & 7, warp.lane >> 3
    token = (in_matrix >> 1) * 4 + (in_matrix & 1) + (matrix_number & 1) * 2
    rows = (shared if layout.resident else stage) + token * image.pitch
    rows = rows + (matrix_number >> 1) * CHUNK_BYTES

    def tile(number):
        queries = group.queries(number)
        corners = group.corners(group.load_points(queries, scratch), queries)
        windows = [group.windows(tokens, matrix) for tokens, _ in corners]
        corners = [without_zeros(warp, *both) for both in corners]
        any_window = functools.reduce(lambda a, b: a | b, windows)

        def add_window(window, totals):
            def add(totals):
                if not layout.resident:
                    tokens = [tokens for tokens, _ in corners]
                    bits = group.touched_blocks(tokens, windows, window, matrix)
                    group.copy_blocks(values, window, bits, stage, matrix)
                bits = group.scatter(corners, windows, window, matrix, scratch)
                if not layout.resident:
                    warp.wait_for_own_copies()
                first = window * matrix.window if layout.resident else warp.constant(0)

                def add_block(block, totals):
                    return warp.when(
                        has_bit(bits, block),
                        lambda totals: multiply(first + block, block, totals),
                        totals,
                    )

                totals = warp.loop(matrix.window, add_block, totals)
                warp.wait_for_lanes()
                return totals

            return warp.when(has_bit(any_window, window & 31), add, totals)

        def multiply(block_of_rows, block, totals):
            place = scratch + group.row * matrix.pitch + (block * COLUMNS + group.column * 4) * WORD
            left = []
            for half in range(2):
                quads = [place + (half * 16 + i * 8) * matrix.pitch for i in range(2)]
                entries = [warp.load_shared(x, 4) for x in quads]
                for x in quads:
                    warp.store_shared(x, *[warp.constant(0.0)] * 4)
                left.append(
                    [
                        warp.pack(*e[2 * i : 2 * i + 2], image.dtype)
                        for i in range(2)
                        for e in entries
                    ]
                )
            totals = list(totals)
            address = rows + block_of_rows * (COLUMNS * image.pitch)
            for chunks in group.chunk_pairs:
                right = group.columns_of_rows(address, chunks)
                for i, chunk in enumerate(chunks):
                    for half in range(2):
                        n = 2 * chunk + half
                        totals[n] = warp.add_product(
                            totals[n], left[half], right[2 * i : 2 * i + 2], image.dtype
                        )
            return totals

        zeros = [[warp.constant(0.0)] * 4 for _ in range(2 * image.chunks)]
        num_windows = -(-column_blocks(image) // matrix.window)
        totals = warp.loop(num_windows, add_window, zeros)
        for n, total in enumerate(totals):
            chunk, half = divmod(n, 2)
            for i in range(2):
                query = queries.first + group.row + (16 * half + 8 * i)
                index = group.channel(query) + group.column * 2 + CHUNK * chunk
                pair = warp.pack(total[2 * i], total[2 * i + 1], image.dtype)
                warp.store_pair(out, index, pair, mask=query < image.tokens)

    part = warp.block % layout.parts
    for_each_tile(warp, image, tile, part=part, parts=layout.parts)


def _point_gradients_kernel(
    warp: Warp, points: Points, shared, values, d_out, *gradients, layout: Layout
):
    image, matrix = layout.image, layout.matrix
    group = Group(warp, image, warp.block // layout.parts, shared, points)
    scratch, stage = layout.matrix_and_stage(shared, warp)
    if layout.resident:
        group.copy_image(values)
    warp.wait_for_copies()
    # As in the forward, four columns of a block are side by side in a lane.
    in_matrix, matrix_number = warp.lane & 7, warp.lane >> 3
    token = (in_matrix >> 1) * 4 + (in_matrix & 1)
    first_row = shared if layout.resident else stage
    pair_rows = first_row + (token + (matrix_number >> 1) * 2) * image.pitch
    pair_rows = pair_rows + (matrix_number & 1) * CHUNK_BYTES
    last_rows = first_row + (token + (matrix_number & 1) * 2) * image.pitch

    def tile(number):
        queries = group.queries(number)
        loaded = group.load_points(queries, scratch)
        all_tokens = [tokens for tokens, _ in group.corners(loaded, queries)]
        windows = [group.windows(tokens, matrix) for tokens in all_tokens]
        any_window = functools.reduce(lambda a, b: a | b, windows)
        d_rows = []  # left sides, by halves of the queries and pairs of chunks
        for half in range(2):
            starts = [
                group.channel(group.inside(queries.first + group.row + (16 * half + 8 * i)))
                + group.column * 2
                for i in range(2)
            ]
            d_rows.append(
                [
                    [warp.load_pair(d_out, start + CHUNK * c) for c in chunks for start in starts]
                    for chunks in group.chunk_pairs
                ]
            )

        def multiply(block_of_rows, block):
            moved = block_of_rows * (COLUMNS * image.pitch)
            zero = warp.constant(0.0)
            totals = [[[zero] * 4 for _ in range(2)] for _ in range(2)]
            for n, chunks in enumerate(group.chunk_pairs):
                rows = (pair_rows if len(chunks) == 2 else last_rows) + moved
                right = warp.load_matrices(
                    rows, offset=CHUNK_BYTES * chunks[0], count=2 * len(chunks), transposed=False
                )
                size = len(chunks)
                for half in range(2):
                    for part in range(2):
                        totals[half][part] = warp.add_product(
                            totals[half][part],
                            d_rows[half][n],
                            right[part * size : (part + 1) * size],
                            image.dtype,
                        )
            place = scratch + group.row * matrix.pitch + (block * COLUMNS + group.column * 4) * WORD
            for half in range(2):
                for i in range(2):
                    numbers = [totals[half][part][2 * i + j] for part in range(2) for j in range(2)]
                    warp.store_shared(place + (half * 16 + i * 8) * matrix.pitch, *numbers)

        def visit_window(window, products):
            first = window * matrix.columns

            def visit(products):
                bits = group.touched_blocks(all_tokens, windows, window, matrix)
                if not layout.resident:
                    group.copy_blocks(values, window, bits, stage, matrix)
                    warp.wait_for_own_copies()
                first_block = window * matrix.window if layout.resident else warp.constant(0)

                def add_block(block, _):
                    warp.when(has_bit(bits, block), lambda _: multiply(first_block + block, block))

                warp.loop(matrix.window, add_block)
                warp.wait_for_lanes()
                row = scratch + warp.lane * matrix.pitch
                found = []
                for tokens, olds, touched in zip(all_tokens, products, windows, strict=True):

                    def look_up(olds, tokens=tokens):
                        news = []
                        for token, old in zip(tokens, olds, strict=True):
                            inside, column, _ = group.place(token, first, matrix)
                            new = warp.load_shared(row + column * WORD)
                            news.append(warp.select(inside, new, old))
                        return news

                    found.append(warp.when(has_bit(touched, window & 31), look_up, olds))
                warp.wait_for_lanes()
                return found

            return warp.when(has_bit(any_window, window & 31), visit, products)

        zeros = [[warp.constant(0.0)] * 4 for _ in all_tokens]
        products = warp.loop(-(-column_blocks(image) // matrix.window), visit_window, zeros)
        pulled = [
            warp.apply(
                functools.partial(gradients_of_point, image=image), p, queries.x, queries.y, found
            )
            for p, found in zip(loaded, products, strict=True)
        ]
        group.store_gradients(gradients, queries, pulled, scratch)

    part = warp.block % layout.parts
    for_each_tile(warp, image, tile, part=part, parts=layout.parts)


def _values_gradient_kernel(
    warp: Warp, points: Points, shared, d_out, touched, d_values, *, image: Image, matrix: Matrix
):
    num_windows = -(-column_blocks(image) // matrix.window)
    window = warp.block % num_windows
    group = Group(warp, image, warp.block // num_windows, shared, points)
    first = window * matrix.columns
    own_blocks = matrix.window // warp.num_warps
    rows_bytes = QUERIES * image.pitch
    all_rows = shared + warp.num_warps * matrix.bytes
    all_bits = all_rows + warp.num_warps * rows_bytes
    scratch = shared + warp.warp * matrix.bytes
    rows = all_rows + warp.warp * rows_bytes
    group.clear(scratch, matrix.bytes)
    num_tiles = -(-image.tokens // QUERIES)
    # Queries j and j + 4 are entries 2 j and 2 j + 1 of a product's sum, so that a load's rows of
    # the matrix begin in different banks.
    in_matrix, matrix_number = warp.lane & 7, warp.lane >> 3
    query = (in_matrix >> 1) + (in_matrix & 1) * 4 + (matrix_number & 1) * 8
    right_rows = all_rows + query * image.pitch + (matrix_number >> 1) * CHUNK_BYTES
    place = shared + group.column * matrix.pitch
    place = place + (warp.warp * (own_blocks * COLUMNS) + group.row) * WORD

    def copy_rows(queries: Queries):
        pieces = QUERIES * image.chunks
        for step in range(-(-pieces // LANES)):
            piece = warp.lane + step * LANES
            row, chunk = piece // image.chunks, piece % image.chunks
            warp.copy_to_shared(
                rows + row * image.pitch + chunk * CHUNK_BYTES,
                d_out,
                group.channel(group.inside(queries.first + row)) + chunk * CHUNK,
                mask=None,
            )

    def multiply(slot: int, totals):
        totals = [list(x) for x in totals]
        for half in range(2):
            right = []
            for chunks in group.chunk_pairs:
                address = right_rows + (slot * rows_bytes + half * 16 * image.pitch)
                right += group.columns_of_rows(address, chunks)
            for block in range(own_blocks):
                entries = [
                    [
                        warp.load_shared(
                            place
                            + (
                                slot * matrix.bytes
                                + (half * 16 + q) * matrix.pitch
                                + (block * COLUMNS + t) * WORD
                            )
                        )
                        for q in (0, 4, 8, 12)
                    ]
                    for t in (0, 8)
                ]
                left = [warp.pack(*e[i : i + 2], image.dtype) for i in (0, 2) for e in entries]
                for chunk in range(image.chunks):
                    totals[block][chunk] = warp.add_product(
                        totals[block][chunk], left, right[2 * chunk : 2 * chunk + 2], image.dtype
                    )
        return totals

    def visit_tiles(step, carry):
        word, base, totals = carry
        number = warp.nth_bit(word, step * warp.num_warps + warp.warp)
        tile = warp.select(number < 0, warp.constant(0), base + number)
        queries = group.queries(tile)
        copy_rows(queries)
        corners = group.corners(group.load_points(queries, scratch), queries)
        windows = [group.windows(tokens, matrix) for tokens, _ in corners]
        corners = [without_zeros(warp, *both) for both in corners]
        nowhere = warp.constant(NOWHERE)
        corners = [
            (
                [
                    warp.select(number < 0, nowhere, warp.select(queries.exists, t, nowhere))
                    for t in tokens
                ],
                weights,
            )
            for tokens, weights in corners
        ]
        bits = group.scatter(corners, windows, window, matrix, scratch)
        warp.store_shared(all_bits + warp.warp * WORD, bits)
        warp.wait_for_copies()
        for slot in range(warp.num_warps):
            bits = warp.load_shared_bits(all_bits + slot * WORD)
            own = (bits >> (warp.warp * own_blocks)) & (2**own_blocks - 1)
            totals = warp.when(warp.constant(0) < own, functools.partial(multiply, slot), totals)
        warp.wait_for_block()
        group.clear(scratch, matrix.bytes)
        warp.wait_for_lanes()
        return word, base, totals

    def visit_tiles_of_word(number, totals):
        base = number * LANES
        tile = base + warp.lane
        tile = warp.select(tile < num_tiles, tile, warp.constant(num_tiles - 1))
        index = (warp.block // num_windows) * num_tiles + tile
        touches = has_bit(warp.load_bits(touched, index), window & 31)
        word = warp.ballot(touches)
        if num_tiles % LANES:
            left = warp.constant(num_tiles) - base
            full = warp.constant(-1)
            some = warp.select(left < LANES, (warp.constant(1) << (left & 31)) - 1, full)
            word = word & some
        count = (warp.popcount(word) + (warp.num_warps - 1)) // warp.num_warps
        return warp.loop(count, visit_tiles, (word, base, totals))[2]

    zero = warp.constant(0.0)
    zeros = [[[zero] * 4 for _ in range(image.chunks)] for _ in range(own_blocks)]
    totals = warp.loop(-(-num_tiles // LANES), visit_tiles_of_word, zeros)
    for block in range(own_blocks):
        for chunk in range(image.chunks):
            for i in range(2):
                token = (warp.warp * own_blocks + block) * COLUMNS + group.row + (8 * i)
                token = token + first
                index = group.channel(token) + group.column * 2 + CHUNK * chunk
                pair = totals[block][chunk][2 * i : 2 * i + 2]
                pair = warp.pack(*pair, image.dtype)
                warp.store_pair(d_values, index, pair, mask=token < image.tokens)
