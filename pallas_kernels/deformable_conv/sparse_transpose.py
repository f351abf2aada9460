"""The gradient of the values, Aᵀ d out, by the matrix of `sparse_matrix.py`, for NVIDIA's Hopper.

A block of threads has a window of tokens and visits all queries that touch it, of which a mask
tells, in order, so every run gives the same bits. Each warp writes 32 queries' rows of A at a time;
then each multiplies its own tokens' columns of all those rows.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv.group import Extents, Queries, num_tiles
from pallas_kernels.deformable_conv.image import Image, image_of
from pallas_kernels.deformable_conv.interpolation import BASES, discard_non_finite
from pallas_kernels.deformable_conv.launch import launch
from pallas_kernels.deformable_conv.matrix_rows import (
    CHUNK,
    CHUNK_BYTES,
    COLUMNS,
    Matrix,
    MatrixGroup,
    chunks,
    column_blocks,
    pitch,
)
from pallas_kernels.deformable_conv.point_rows import QUERIES, WORD
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

NOWHERE = 1 << 28  # a token that no image has: of eight channels there are 2^31 - 1 at most
WINDOWS = 2  # of a block: a visit's points are evaluated once for them


def values_gradient(
    points,
    d_out,
    extents: Extents | None = None,
    *,
    h: int,
    w: int,
    boundary: str,
    window: int,
    num_warps: int,
    interpret: bool,
):
    """The gradient of the values, like d_out [B, tokens, G, C].

    `extents` are what `sparse_matrix.point_gradients` has found; without, XLA finds them.
    """
    image = image_of(d_out, points, h, w, boundary)
    matrix = Matrix(window)
    if extents is None:
        extents = extents_of(points, h=h, w=w, boundary=boundary)
    (d_values,) = launch(
        functools.partial(_values_gradient_kernel, image=image, matrix=matrix),
        name="deformable_values_gradient_sparse_matrix",
        num_blocks=d_out.shape[0] * image.groups * _parts(image, matrix),
        shared_bytes=num_warps * (matrix.bytes + QUERIES * pitch(image) + WORD * 4),
        points=points,
        inputs=(d_out, *extents),
        outputs=(jax.ShapeDtypeStruct(d_out.shape, d_out.dtype),),
        num_warps=num_warps,
        interpret=interpret,
    )
    return d_values


def extents_of(points: Points, *, h: int, w: int, boundary: str) -> Extents:
    """Where the corners of each 32 queries may begin.

    Coordinates may be rounded otherwise here than in the kernels, hence a margin.
    """
    offsets = points.to_offsets().offsets
    batch, tokens, groups = offsets.shape[:3]
    query = jnp.arange(tokens)
    x = offsets[..., 0].astype(jnp.float32) + (query % w).astype(jnp.float32)[:, None, None]
    y = offsets[..., 1].astype(jnp.float32) + (query // w).astype(jnp.float32)[:, None, None]
    x, y = discard_non_finite(x, y)

    def ends(margin, reduce):
        column, row = (
            jnp.clip(BASES[boundary](z + margin), -2, size) for z, size in ((x, w), (y, h))
        )
        token = row.astype(jnp.int32) * w + column.astype(jnp.int32)
        filling = -tokens % QUERIES
        token = jnp.pad(token, ((0, 0), (0, filling), (0, 0), (0, 0)), mode="edge")
        token = token.reshape(batch, -1, QUERIES, groups, token.shape[-1])
        return reduce(token, axis=(2, 4)).swapaxes(1, 2)

    return Extents(ends(-1e-3, jnp.min), ends(1e-3, jnp.max))


def _parts(image: Image, matrix: Matrix) -> int:
    """Blocks that share an image."""
    return -(-column_blocks(image) // (WINDOWS * matrix.window))


def _values_gradient_kernel(
    warp: Warp, points: Points, shared, d_out, *others, image: Image, matrix: Matrix
):
    extents, d_values = Extents(*others[:2]), others[2]
    parts = _parts(image, matrix)
    group = MatrixGroup(warp, image, warp.block // parts, shared, points)
    first_window = (warp.block % parts) * WINDOWS
    windows = [group.window(first_window + n, matrix) for n in range(WINDOWS)]
    first, num_tokens = windows[0].first, WINDOWS * matrix.columns
    own_blocks = matrix.window // warp.num_warps
    all_blocks = 2**matrix.window - 1
    rows_bytes = QUERIES * pitch(image)
    all_rows = shared + warp.num_warps * matrix.bytes
    all_bits = all_rows + warp.num_warps * rows_bytes
    scratch = shared + warp.warp * matrix.bytes
    rows = all_rows + warp.warp * rows_bytes
    group.clear(scratch, matrix.bytes)
    tiles = num_tiles(image)
    # Queries j and j + 4 are entries 2 j and 2 j + 1 of a product's sum, so that a load's rows of
    # the matrix begin in different banks.
    in_matrix, matrix_number = warp.lane & 7, warp.lane >> 3
    query = (in_matrix >> 1) + (in_matrix & 1) * 4 + (matrix_number & 1) * 8
    right_rows = all_rows + query * pitch(image) + (matrix_number >> 1) * CHUNK_BYTES
    place = shared + group.column * matrix.pitch
    place = place + (warp.warp * (own_blocks * COLUMNS) + group.row) * WORD

    def copy_rows(queries: Queries):
        pieces = QUERIES * chunks(image)
        for step in range(-(-pieces // LANES)):
            piece = warp.lane + step * LANES
            row, chunk = piece // chunks(image), piece % chunks(image)
            warp.copy_to_shared(
                rows + row * pitch(image) + chunk * CHUNK_BYTES,
                d_out,
                group.channel(group.inside(queries.first + row)) + chunk * CHUNK,
                mask=None,
            )

    def multiply(slot: int, totals):
        totals = [list(x) for x in totals]
        for half in range(2):
            right = []
            for pair in group.chunk_pairs:
                address = right_rows + (slot * rows_bytes + half * 16 * pitch(image))
                right += group.columns_of_rows(address, pair)
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
                for chunk in range(chunks(image)):
                    totals[block][chunk] = warp.add_product(
                        totals[block][chunk], left, right[2 * chunk : 2 * chunk + 2], image.dtype
                    )
        return totals

    def add_points(points, window, bits):
        """Bits of the window's blocks that got anything."""
        for corners in points:
            touched = warp.union(group.bits(corners.token, window) & all_blocks)
            warp.when(
                touched != 0,
                lambda _, corners=corners: group.add(corners, window, matrix, scratch),
            )
            bits = bits | touched
        return bits

    def visit_tiles_of_word(number_of_word, totals):
        base = number_of_word * LANES
        tile = base + warp.lane
        exists = tile < tiles
        index = group.number * tiles + warp.select(exists, tile, warp.constant(tiles - 1))
        found = Extents(*(warp.load_pair(ref, index) for ref in extents))
        word = warp.ballot(found.touch(first, num_tokens, image) & exists)

        def number_of(step):
            """(whether there is a tile for this warp in a step, its bit's number)."""
            number = warp.nth_bit(word, step * warp.num_warps + warp.warp)
            exists = warp.constant(-1) < number
            return exists, warp.select(exists, number, warp.constant(0))

        def load(step):
            return group.points.load(base + number_of(step)[1])

        def visit(step, carry):
            loaded, totals = carry
            exists, number = number_of(step)
            own = Extents(*(warp.shuffle(x, number) for x in found))
            queries = group.queries(base + number)
            copy_rows(queries)
            words = group.points.exchange(loaded, scratch)
            group.clear(scratch, group.points.bytes)
            warp.wait_for_lanes()
            some = exists
            if queries.exists is not None:
                some = warp.select(queries.exists, some, queries.exists)
            nowhere = warp.constant(NOWHERE)
            points = []
            for k, x in enumerate(words):
                corners = group.corners(group.points.fields(x, k), queries)
                token = warp.select(some, corners.token, nowhere)
                points.append(corners._replace(token=token))
            totals = list(totals)
            for n, window in enumerate(windows):
                bits = warp.when(
                    exists & own.touch(window.first, window.size, image),
                    functools.partial(add_points, points, window),
                    warp.constant(0),
                )
                warp.store_shared(all_bits + warp.warp * WORD, bits)
                if n == WINDOWS - 1:
                    loaded = load(step + 1)
                if n == 0:
                    warp.wait_for_copies()
                else:
                    warp.wait_for_block()
                for slot in range(warp.num_warps):
                    others = warp.load_shared_bits(all_bits + slot * WORD)
                    mine = (others >> (warp.warp * own_blocks)) & (2**own_blocks - 1)
                    totals[n] = warp.when(mine != 0, functools.partial(multiply, slot), totals[n])
                warp.wait_for_block()
                group.clear_blocks(bits, matrix, scratch)
                warp.wait_for_lanes()
            return loaded, totals

        count = (warp.popcount(word) + (warp.num_warps - 1)) // warp.num_warps
        return warp.loop(count, visit, (load(warp.constant(0)), totals))[1]

    zero = warp.constant(0.0)
    zeros = [[[zero] * 4 for _ in range(chunks(image))] for _ in range(own_blocks)]
    totals = warp.loop(-(-tiles // LANES), visit_tiles_of_word, [zeros] * WINDOWS)
    for (n, window), block in itertools.product(enumerate(windows), range(own_blocks)):
        for chunk, i in itertools.product(range(chunks(image)), range(2)):
            token = (warp.warp * own_blocks + block) * COLUMNS + group.row + (8 * i)
            token = token + window.first
            index = group.channel(token) + group.column * 2 + CHUNK * chunk
            pair = warp.pack(*totals[n][block][chunk][2 * i : 2 * i + 2], image.dtype)
            warp.store_pair(d_values, index, pair, mask=token < image.tokens)
