"""Sampling points in the order of the tokens around them, for NVIDIA's Hopper.

A point belongs to the upper left of the four tokens inside the image that it lies between. A list
for each image of a group has the points of the first token, then of the second, and so on: the
number of the point's query and the weights of the four tokens. Each token's points begin at a
multiple of four, as `list_gradient.py` takes four at a time; where they are not as many, one of
them is repeated without weights. Points without any weight are in no list.

A warp counts how many points of its own queries belong to each token; what all warps have counted
tells each where its points go. So the order, too, is the same in every run.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv.group import Group, num_tiles
from pallas_kernels.deformable_conv.image import Image, image_of
from pallas_kernels.deformable_conv.inner_corners import corners_of_points
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES, launch
from pallas_kernels.deformable_conv.point_rows import WORD, exchange_bytes
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

FOUR = 4  # points that are taken at a time
NUM_WARPS = 8
COUNT_BYTES = 2  # counts and places are numbers of 16 bits
READ_AHEAD = LANES  # points
MAX_OWN_BYTES = 4608  # that a warp needs to exchange up to nine points of 32 bits a number


class Lists(NamedTuple):
    """The lists of a call; N is `capacity`."""

    queries: jax.Array  # [B, G, N] int16, a query's token
    # [B, G, N, 4] of the values' dtype. Of 32 bits: the weights of the upper left token, upper
    # right, lower left, lower right. Of 16 bits: of the token with even x and even y, odd x and
    # even y, even x and odd y, odd x and odd y, which the four are in some order.
    weights: jax.Array
    starts: jax.Array  # [B, G, tokens + 1] int32: where a token's points begin, in fours


def capacity(tokens: int, num_points: int) -> int:
    """Places in a list: of all points, and of three repeated ones for each token.

    Behind the list are more, so that it can be read ahead of its end.
    """
    return -(-tokens * (num_points + FOUR - 1) // FOUR) * FOUR + READ_AHEAD


def num_bytes(tokens: int, num_points: int, dtype) -> int:
    """Of an image's list."""
    point_bytes = 2 + 4 * jnp.dtype(dtype).itemsize
    return capacity(tokens, num_points) * point_bytes + (tokens + 1) * WORD


def why_not(h: int, w: int, num_points: int) -> str | None:
    """Why points can't be sorted; None if they can."""
    if min(h, w) < 2:
        return f"the images are {h} x {w}; expected at least 2 x 2"
    tokens = h * w
    shared_bytes = NUM_WARPS * (_counts_bytes(tokens) + MAX_OWN_BYTES)
    if capacity(tokens, num_points) >= 2**16 or shared_bytes > MAX_SHARED_BYTES:
        return f"the images are {h} x {w}, too large to count {num_points} points a token"
    return None


def sort(values, points, *, h: int, w: int, boundary: str, interpret: bool) -> Lists:
    """The lists of points with flattened tokens; `values` [B, tokens, G, C] has sizes and dtype."""
    image = image_of(values, points, h, w, boundary)
    batch, size = values.shape[0], capacity(image.tokens, image.num_points)
    shape = batch, image.groups, size
    own_bytes = _counts_bytes(image.tokens) + exchange_bytes(points)
    return Lists(
        *launch(
            functools.partial(_kernel, image=image),
            name="deformable_sort_points",
            num_blocks=batch * image.groups,
            shared_bytes=NUM_WARPS * (own_bytes + WORD),
            points=points,
            inputs=(),
            outputs=(
                jax.ShapeDtypeStruct(shape, jnp.int16),
                jax.ShapeDtypeStruct((*shape, 4), values.dtype),
                jax.ShapeDtypeStruct((*shape[:2], image.tokens + 1), jnp.int32),
            ),
            num_warps=NUM_WARPS,
            interpret=interpret,
        )
    )


def _counts_bytes(tokens: int) -> int:
    """Of a warp's counts, one more than tokens: two in a word, of all lanes a row of words."""
    return -(-(tokens + 1) // (2 * LANES)) * LANES * WORD


def _kernel(warp: Warp, points: Points, shared, *lists, image: Image):
    queries, weights, starts = lists
    group = Group(warp, image, warp.block, points)
    counts_bytes = _counts_bytes(image.tokens)
    counts = shared + warp.warp * counts_bytes
    sums = shared + warp.num_warps * counts_bytes
    scratch = sums + warp.num_warps * WORD
    scratch = scratch + warp.warp * group.points.bytes
    first_place = group.number * capacity(image.tokens, image.num_points)
    words_of_warp = -(-counts_bytes // (LANES * WORD * warp.num_warps))  # for each lane
    words_of_point = image.dtype.itemsize  # of its four weights
    before = warp.bit(warp.lane) - 1  # a bit for each lane before this one

    def clear(step, _):
        warp.store_shared(counts + (step * LANES + warp.lane) * WORD, warp.constant(0))

    def for_each_point(visit):
        """Counts the points of the warp's queries. visit(queries, corners, whether there is a
        point, what its token's count was before) for each point of a lane, unless it is None."""
        tiles = num_tiles(image)

        def tile_of(step):
            tile = step * warp.num_warps + warp.warp
            return warp.select(tile < tiles, tile, warp.constant(0))

        def visit_tile(step, loaded):
            words = group.points.exchange(loaded, scratch)
            loaded = group.points.load(tile_of(step + 1))
            exists = step * warp.num_warps + warp.warp < tiles
            warp.when(exists, lambda _: visit_points(tile_of(step), words))
            return loaded

        def visit_points(tile, words):
            found = group.queries(tile)
            all_corners = corners_of_points(group, words, found)
            same = []
            for corners in all_corners:
                (upper, lower), (left, right) = corners.rows, corners.columns
                exists = ((upper != 0) | (lower != 0)) & ((left != 0) | (right != 0))
                if found.exists is not None:
                    exists = exists & found.exists
                token = corners.y * image.w + corners.x
                key = warp.select(exists, token, warp.constant(-1))
                same.append((exists, token, warp.match(key)))
            for corners, (exists, token, lanes) in zip(all_corners, same, strict=True):
                place = counts + token * COUNT_BYTES
                rank = warp.popcount(lanes & before)
                count = warp.load_shared_half(place, 0)
                warp.wait_for_lanes()
                is_first = exists & (rank == 0)
                warp.when(
                    is_first,
                    lambda _, place=place, count=count, lanes=lanes: warp.store_shared_half(
                        place, count + warp.popcount(lanes)
                    ),
                )
                warp.wait_for_lanes()
                if visit is not None:
                    visit(found, corners, exists, count + rank)

        steps = -(-tiles // warp.num_warps)
        warp.loop(steps, visit_tile, group.points.load(tile_of(warp.constant(0))))

    def words(step):
        """(number of the lane's word of counts in a step, whether it is there)."""
        word = (warp.warp * words_of_warp + step) * LANES + warp.lane
        return word, word < counts_bytes // WORD

    def load_words(word, is_there):
        """A word of all warps."""
        zero = warp.constant(0)
        place = shared + warp.select(is_there, word, zero) * WORD
        loaded = [warp.load_shared_bits(place + n * counts_bytes) for n in range(warp.num_warps)]
        return [warp.select(is_there, x, zero) for x in loaded]

    def halves(word):
        """The numbers of two tokens."""
        return word & 0xFFFF, (word >> 16) & 0xFFFF

    def fours(word):
        """Of two tokens, of which a word holds the counts."""
        return tuple((count + (FOUR - 1)) >> 2 for count in halves(word))

    def add_up(step, total):
        low, high = fours(sum(load_words(*words(step)), start=warp.constant(0)))
        return total + low + high

    def place_words(step, first):
        """Replaces counts by places; `first` is the first four's of the warp's next token."""
        word, is_there = words(step)
        loaded = load_words(word, is_there)
        low, high = fours(sum(loaded, start=warp.constant(0)))
        until = low + high  # of all lanes up to this one
        for distance in (1, 2, 4, 8, 16):
            source = warp.select(warp.lane < distance, warp.lane, warp.lane - distance)
            other = warp.shuffle(until, source)
            until = until + warp.select(warp.lane < distance, warp.constant(0), other)
        start = first + until - (low + high)
        token = word * 2
        index = group.number * (image.tokens + 1) + token
        for n, four in enumerate((start, start + low)):
            warp.store_words(starts, index + n, [four], mask=token + n < image.tokens + 1)
        place = (start | ((start + low) << 16)) << 2

        def store(_):
            now = place
            for n, count in enumerate(loaded):
                warp.store_shared(shared + word * WORD + n * counts_bytes, now)
                now = now + count

        warp.when(is_there, store)
        return first + warp.shuffle(until, warp.constant(LANES - 1))

    def store_point(found, corners, exists, place):
        """Writes a lane's point into the list."""
        place = first_place + place
        warp.store_half(queries, place, found.token, mask=exists)
        rows, columns = corners.rows, corners.columns
        if words_of_point == 2:
            rows, columns = (
                [warp.select((z & 1) == 1, both[1 - n], both[n]) for n in range(2)]
                for z, both in ((corners.y, rows), (corners.x, columns))
            )
        numbers = [row * x for row in rows for x in columns]
        if words_of_point == 2:
            numbers = [warp.pack(*numbers[n : n + 2], image.dtype) for n in (0, 2)]
        warp.store_words(weights, place * 4, numbers, mask=exists)

    def repeat_points(step, _):
        """Fills the last four places of two tokens' points."""
        word, is_there = words(step)
        place = shared + warp.select(is_there, word, warp.constant(0)) * WORD
        end = warp.load_shared_bits(place + (warp.num_warps - 1) * counts_bytes)
        missing_after = []
        for after in halves(end):
            missing = is_there & ((after & (FOUR - 1)) != 0)
            after = first_place + after
            last = warp.select(missing, after - 1, warp.constant(0))
            missing_after.append((missing, after, warp.load_half(queries, last)))
        for missing, after, query in missing_after:
            for n in range(FOUR - 1):
                still = missing & (((after + n) & (FOUR - 1)) != 0)
                missing = still
                warp.store_half(queries, after + n, query, mask=still)
                zeros = [warp.constant(0)] * words_of_point
                warp.store_words(weights, (after + n) * 4, zeros, mask=still)

    warp.loop(counts_bytes // (LANES * WORD), clear)
    warp.wait_for_lanes()
    for_each_point(None)
    warp.wait_for_block()
    total = warp.loop(words_of_warp, add_up, warp.constant(0))
    for distance in (1, 2, 4, 8, 16):
        total = total + warp.shuffle(total, warp.lane + distance - (warp.lane & distance) * 2)
    warp.store_shared(sums + warp.warp * WORD, total)
    warp.wait_for_block()
    first = end = zero = warp.constant(0)
    for n in range(warp.num_warps):
        other = warp.load_shared_bits(sums + n * WORD)
        first = first + warp.select(warp.constant(n) < warp.warp, other, zero)
        end = end + other
    beyond = first_place + end * FOUR + warp.lane
    warp.store_half(queries, beyond, zero, mask=warp.warp == 0)
    warp.loop(words_of_warp, place_words, first)
    warp.wait_for_block()
    for_each_point(store_point)
    warp.wait_for_block()
    warp.loop(words_of_warp, repeat_points)
