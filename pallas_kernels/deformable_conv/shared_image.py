"""Kernels that keep the image of a group in shared memory, for NVIDIA's Hopper.

A block has one group of one image, and its warps take 16 queries at a time. The rows of C channels
at the corners of the sampling points are fetched by `ldmatrix`, whose rows may lie anywhere, right
into the operands of tensor-core products: forward, the rows (transposed) times a diagonal matrix of
their weights; for the gradients of the points, the rows times the queries' rows of d out
(transposed), of which only a diagonal is wanted. That is an eighth of what the tensor cores could
do, but they have it to spare, and no number is converted, multiplied or added by other means.
Nothing is shared between queries, so every run gives the same bits.

A product takes 16 rows: of 8 queries, two each. Lane 16 i + q of a warp looks after one row at a
time for query q: of the first of two sampling points in the lower half of the warp (i = 0), of the
second in the upper half; or, of a last point alone, of its left and its right corners.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_conv.image_block import (
    CHUNK,
    CHUNK_BYTES,
    QUERIES,
    Block,
    Image,
    Sampler,
    gradients_of_point,
)
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES, launch
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import Warp


def parts(h: int, w: int, channels: int) -> int | None:
    """How many parts the channels must be in, so that an image fits; None if it never does."""
    for number in range(1, channels // CHUNK + 1):
        image = Image(1, h, w, channels, number, 1, np.dtype(np.float16), "zeros")
        if channels % (CHUNK * number) == 0 and image.shared_bytes <= MAX_SHARED_BYTES:
            return number
    return None


def why_not(h: int, w: int, channels: int, dtype, *, in_parts: bool) -> str | None:
    """Why a kernel can't take such values, all channels at once or in parts; None if it can."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"the values are {jnp.dtype(dtype).name}; expected bfloat16 or float16"
    if channels % CHUNK:
        return f"there are {channels} channels; expected a multiple of {CHUNK}"
    number = parts(h, w, channels)
    if number is None or (number > 1 and not in_parts):
        return f"a group's image of {h} x {w} tokens does not fit into shared memory"
    return None


def forward(values, points, *, h: int, w: int, boundary: str, num_warps: int, interpret: bool):
    """out [B, tokens, G, C] of values [B, tokens, G, C] and points with flattened tokens."""
    image = _image(values, points, h, w, boundary, parts(h, w, values.shape[-1]))
    (out,) = launch(
        functools.partial(_forward_kernel, image=image),
        name="deformable_forward_shared_image",
        num_blocks=values.shape[0] * image.groups * image.parts,
        shared_bytes=image.shared_bytes,
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
    num_warps: int,
    interpret: bool,
) -> list[jax.Array]:
    """The gradients of points.per_query, in `dtypes`; values and d_out are [B, tokens, G, C]."""
    image = _image(values, points, h, w, boundary, 1)
    return launch(
        functools.partial(_point_gradients_kernel, image=image),
        name="deformable_point_gradients_shared_image",
        num_blocks=values.shape[0] * image.groups * image.parts,
        shared_bytes=image.shared_bytes,
        points=points,
        inputs=(values, d_out),
        outputs=tuple(
            jax.ShapeDtypeStruct(x.shape, dtype)
            for x, dtype in zip(points.per_query, dtypes, strict=True)
        ),
        num_warps=num_warps,
        interpret=interpret,
    )


def _image(values, points: Points, h: int, w: int, boundary: str, parts: int) -> Image:
    groups, channels = values.shape[2:]
    num_points = points.weights.shape[-1]
    return Image(groups, h, w, channels, parts, num_points, values.dtype, boundary)


# --- kernels -------------------------------------------------------------------------------------


def _forward_kernel(warp: Warp, points: Points, shared, values, out, *, image: Image):
    block = Block(warp, image, shared)
    block.copy_image(values)
    sampler = Sampler(block, points)
    zero = warp.constant(0)
    selectors = block.diagonal_selectors()
    # What a product gives: of 8 queries 16 channels, or of all queries the 8 channels left.
    whole = [(octet, pair) for pair in block.chunk_pairs if len(pair) == 2 for octet in range(2)]
    blocks = whole + [(None, last) for last in block.chunk_pairs if len(last) == 1]
    warp.wait_for_copies()

    def tile(number):
        queries = block.queries(number)

        def add_points(points, count, totals):
            totals = list(totals)
            offsets, weights = block.corners(points, count, queries)
            for n in range(0, len(offsets), 2):
                pair = warp.pack(weights[n], weights[n + 1], image.dtype)
                spread = [warp.shuffle(pair, block.row + 8 * i) for i in range(4)]
                for offset, selector in zip(offsets[n : n + 2], selectors, strict=True):
                    # The diagonals of queries 0-7 and 8-15 of the lower half, then of the upper.
                    diagonal = [warp.permute_bytes(x, selector) for x in spread]
                    address = block.shared + offset
                    for i, (octet, columns) in enumerate(blocks):
                        totals[i] = add_rows(totals[i], address, diagonal, octet, columns)
            return totals

        def add_rows(total, address, diagonal, octet, columns):
            if len(columns) == 2:
                rows = block.rows_transposed(address, octet, columns[0])
                return warp.add_product(total, rows, diagonal[octet::2], image.dtype)
            # Eight channels are left: rows times diagonals as above, of all 16 queries.
            rows = warp.load_matrices(
                address, offset=CHUNK_BYTES * columns[0], count=4, transposed=True
            )
            for i in (0, 2):
                left = [diagonal[i], zero, zero, diagonal[i + 1]]
                total = warp.add_product(total, left, rows[i : i + 2], image.dtype)
            return total

        zeros = [[warp.constant(0.0)] * 4 for _ in blocks]
        totals = sampler.for_each_pair(queries, add_points, zeros)
        for (octet, columns), total in zip(blocks, totals, strict=True):
            for i in range(2):
                numbers = warp.pack(total[2 * i], total[2 * i + 1], image.dtype)
                if len(columns) == 2:
                    numbers, query, chunk = warp.transpose(numbers), octet, columns[i]
                else:
                    query, chunk = i, columns[0]
                query = queries.first + block.row + 8 * query
                index = block.channel(query) + block.column * 2 + CHUNK * chunk
                warp.store_pair(out, index, numbers, mask=block.exists(query))

    block.for_each_tile(tile)


def _point_gradients_kernel(
    warp: Warp, points: Points, shared, values, d_out, *gradients, image: Image
):
    block = Block(warp, image, shared)
    block.copy_image(values)
    sampler = Sampler(block, points)
    odd_row = (block.row & 1) == 1
    in_octet = warp.lane & 7
    source = in_octet * 4 + (in_octet >> 1)  # the lane that has the diagonal's entry of this row
    upper_half, second_octet = warp.lane >> 4 == 1, warp.lane >> 3 & 1 == 1
    warp.wait_for_copies()

    def tile(number):
        queries = block.queries(number)
        d_rows = block.matrix_of_queries(d_out, queries)

        def products(address):
            """d out . v of the row at the lane's address."""
            octets = []
            for octet in range(2):
                total = [warp.constant(0.0)] * 4
                for chunks, d_row in zip(block.chunk_pairs, d_rows[octet], strict=True):
                    rows = block.rows(address, octet, chunks)
                    total = warp.add_product(total, rows, d_row, image.dtype)
                lower, upper = (warp.select(odd_row, *total[i : i + 2][::-1]) for i in (0, 2))
                halves = (warp.shuffle(x, source) for x in (upper, lower))
                octets.append(warp.select(upper_half, *halves))
            return warp.select(second_octet, *octets[::-1])

        def write_gradients(points, count, _):
            offsets, _ = block.corners(points, count, queries)
            found = [products(block.shared + offset) for offset in offsets]
            if count == 1:  # the right corners' are in the upper half of the warp
                opposite = (warp.lane & (QUERIES - 1)) + QUERIES
                found = [y for x in found for y in (x, warp.shuffle(x, opposite))]
            pulled = warp.apply(
                functools.partial(gradients_of_point, image=image),
                points.fields,
                queries.x,
                queries.y,
                found,
            )
            mask = queries.exists
            if count == 1:
                lower_half = warp.lane < QUERIES
                mask = lower_half if mask is None else mask & lower_half
            for ref, gradient in zip(gradients, pulled, strict=True):
                numbers = gradient if isinstance(gradient, tuple) else (gradient,)
                warp.store(ref, points.index * len(numbers), *numbers, mask=mask)

        sampler.for_each_pair(queries, write_gradients)

    block.for_each_tile(tile)
