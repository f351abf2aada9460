"""A kernel of the points' gradients by the interpolation matrix, for NVIDIA's Hopper.

The forward would be A values, with a row of A for each query and a column for each token; a row has
at most four entries a sampling point. The gradients of the points look up those entries of
d out valuesᵀ. A warp takes 32 queries, one a lane: blocks of 16 columns in which any of them has an
entry are computed by the tensor cores, a window at a time, and go to shared memory, where
each lane finds its own. The values of a group's image are in shared memory all the time. Nothing is
added up across lanes, so every run gives the same bits.

The gradient of the values, Aᵀ d out, is in `sparse_transpose.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_conv.group import (
    Extents,
    for_each_tile,
    point_gradient_structs,
)
from pallas_kernels.deformable_conv.image import Image, gradients_of_point, image_of
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES, launch
from pallas_kernels.deformable_conv.matrix_rows import (
    CHUNK,
    CHUNK_BYTES,
    COLUMNS,
    WORD,
    Layout,
    Matrix,
    MatrixGroup,
    for_each_bit,
    pitch,
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
    """Whether there is room in shared memory."""
    image = Image(1, h, w, channels, 1, np.dtype(np.float16), "zeros")
    return Layout(image, Matrix(window), num_warps).shared_bytes <= MAX_SHARED_BYTES


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
) -> tuple[list[jax.Array], Extents]:
    """The gradients of points.per_query, in `dtypes`; values and d_out are [B, tokens, G, C].

    And where the sampling points lie, for `sparse_transpose.values_gradient`.
    """
    image = image_of(values, points, h, w, boundary)
    layout = Layout(image, Matrix(window), num_warps)
    *gradients, lowest, highest = launch(
        functools.partial(_point_gradients_kernel, layout=layout),
        name="deformable_point_gradients_sparse_matrix",
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


def _point_gradients_kernel(
    warp: Warp, points: Points, shared, values, d_out, *outputs, layout: Layout
):
    gradients, extents_refs = outputs[:-2], Extents(*outputs[-2:])
    image, matrix = layout.image, layout.matrix
    group = MatrixGroup(warp, image, warp.block, shared, points)
    scratch = layout.scratch(shared, warp)
    # Matrices of 8 tokens by a chunk: two side by side, then those of the next tokens. A chunk that
    # is alone has just the tokens' two.
    in_matrix, matrix_number = warp.lane & 7, warp.lane >> 3
    pair_rows = shared + (in_matrix + (matrix_number >> 1) * 8) * pitch(image)
    pair_rows = pair_rows + (matrix_number & 1) * CHUNK_BYTES
    last_rows = shared + (in_matrix + (matrix_number & 1) * 8) * pitch(image)
    first_place = scratch + group.row * matrix.pitch + group.column * (2 * WORD)

    def tile(number, words, is_there):
        is_there()
        queries = group.queries(number)
        d_rows = []  # left sides, by halves of the queries and pairs of chunks
        for half in range(2):
            starts = [
                group.channel(group.inside(queries.first + group.row + (16 * half + 8 * i)))
                + group.column * 2
                for i in range(2)
            ]
            d_rows.append(
                [
                    [warp.load_pair(d_out, start + CHUNK * c) for c in pair for start in starts]
                    for pair in group.chunk_pairs
                ]
            )

        tokens = [
            group.corners(group.points.fields(x, k), queries).token for k, x in enumerate(words)
        ]
        extents = [group.extent(token) for token in tokens]
        all_extents = group.union(extents)
        group.store_extents(all_extents, number, extents_refs)

        def multiply(block_of_rows, block):
            moved = block_of_rows * (COLUMNS * pitch(image))
            zero = warp.constant(0.0)
            totals = [[[zero] * 4 for _ in range(2)] for _ in range(2)]
            for n, pair in enumerate(group.chunk_pairs):
                rows = (pair_rows if len(pair) == 2 else last_rows) + moved
                right = warp.load_matrices(
                    rows, offset=CHUNK_BYTES * pair[0], count=2 * len(pair), transposed=False
                )
                size = len(pair)
                for half in range(2):
                    for part in range(2):
                        totals[half][part] = warp.add_product(
                            totals[half][part],
                            d_rows[half][n],
                            right[part * size : (part + 1) * size],
                            image.dtype,
                        )
            place = first_place + block * (COLUMNS * WORD)
            for half in range(2):
                for part in range(2):
                    for i in range(2):
                        moved = (half * 16 + i * 8) * matrix.pitch + part * 8 * WORD
                        numbers = totals[half][part][2 * i : 2 * i + 2]
                        warp.store_shared(place + moved, *numbers)

        def visit_window(window, products):
            touched = [extent.touch(window.first, window.size, image) for extent in extents]
            bits = warp.constant(0)
            for token, condition in zip(tokens, touched, strict=True):
                bits = warp.when(
                    condition, lambda x, token=token: x | group.bits(token, window), bits
                )
            bits = warp.union(bits)
            first_block = window.number * matrix.window

            def multiply_block(block, _):
                multiply(first_block + block, block)

            for_each_bit(warp, bits, matrix.window, multiply_block)
            warp.wait_for_lanes()
            products = [
                warp.when(
                    condition,
                    lambda x, token=token: group.look_up(token, x, window, matrix, scratch),
                    old,
                )
                for token, condition, old in zip(tokens, touched, products, strict=True)
            ]
            warp.wait_for_lanes()
            return products

        zeros = [[warp.constant(0.0)] * 4 for _ in words]
        products = group.for_each_window(all_extents, matrix, visit_window, zeros)
        pulled = [
            warp.apply(
                functools.partial(gradients_of_point, image=image),
                group.points.fields(warp.opaque(words[k]), k),
                queries.x,
                queries.y,
                found,
            )
            for k, found in enumerate(products)
        ]
        group.points.store_gradients(gradients, number, pulled, scratch)

    for_each_tile(group, functools.partial(group.copy_image, values), tile, scratch)
