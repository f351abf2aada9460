"""Kernels that build the interpolation matrix in shared memory, for NVIDIA's Hopper.

The forward is A values, with a row of A for each query and a column for each token; a row has at
most four entries a sampling point. A warp takes 32 queries, one a lane. Each lane adds the weights
of its query's sampling points to its own row of A, in float32, entry by entry: the work does not
grow with the image, and nothing is shared between lanes, so every run gives the same bits. Blocks
of 16 columns that were touched then go through the tensor cores. A window of columns is in shared
memory at a time, the values of a group's image all the time.

The gradients of the points look up entries of d out valuesᵀ, of which the touched blocks are
computed. The gradient of the values, Aᵀ d out, is in `sparse_transpose.py`.
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
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES, launch
from pallas_kernels.deformable_conv.matrix_rows import (
    COLUMNS,
    WORD,
    Group,
    Layout,
    Matrix,
    column_blocks,
    for_each_tile,
    has_bit,
    image_of,
    without_zeros,
)
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import Warp

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
    image = image_of(values, points, h, w, boundary)
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
    image = image_of(values, points, h, w, boundary)
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
