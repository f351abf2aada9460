"""How a warp of `list_gradient.py` adds up rows of d out, four points at a time.

Both ways have the sums of the four tokens around the points of a list's token in registers, and
finish the left two before the warp goes on to the token on the right.
"""

from typing import NamedTuple

from pallas_kernels.deformable_conv.image import Image
from pallas_kernels.deformable_conv.point_lists import FOUR
from pallas_kernels.deformable_conv.point_rows import WORD
from pallas_kernels.deformable_conv.warp import LANES, Warp

PIECE_BYTES = 16
STRIP = 8  # tokens from left to right that a warp has


class Strip(NamedTuple):
    """Where a warp's tokens are."""

    image: Image
    first_x: object
    first_entry: object  # of token 0, in arrays [B, tokens, G, ...]
    shared: object  # address of the warp's sums

    def channel(self, token):
        """The token's first channel, in arrays [B, tokens, G, C]."""
        return (self.first_entry + token * self.image.groups) * self.image.channels


class Ring(NamedTuple):
    """Where the rows of d out of some fours of points, and the points' weights, are in shared
    memory: they are copied while a warp adds up those before."""

    image: Image
    ahead: int  # fours that are copied at a time

    @property
    def points(self) -> int:
        return FOUR * self.ahead

    @property
    def pieces(self) -> int:
        """Pieces of a row."""
        return self.image.channels * self.image.dtype.itemsize // PIECE_BYTES

    @property
    def pitch(self) -> int:
        """Bytes from row to row, such that any piece of four rows is in different banks."""
        return (self.pieces | 1) * PIECE_BYTES

    @property
    def bytes(self) -> int:
        """Of what is copied at a time."""
        return self.points * (self.pitch + 4 * self.image.dtype.itemsize)

    def copy(self, warp: Warp, place, strip: Strip, d_out, weights, query, first_point) -> None:
        """Begins to copy; lane n has the query of point n, of the points from first_point."""
        piece_items = PIECE_BYTES // self.image.dtype.itemsize
        eight, piece = warp.lane >> 3, warp.lane & 7

        def copy(point, piece, mask):
            first = strip.channel(warp.shuffle(query, point))
            address = place + point * self.pitch + piece * PIECE_BYTES
            index = first + piece * piece_items
            warp.copy_to_shared(address, d_out, index, mask=mask, again=True)

        wholes, rest = divmod(self.pieces, 8)
        for four in range(self.ahead):
            for whole in range(wholes):
                copy(eight + four * FOUR, piece + whole * 8, None)
        for first in range(0, self.points * rest, LANES):
            number = warp.lane + first
            mask = None
            if self.points * rest < first + LANES:
                mask = number < self.points * rest
                number = warp.select(mask, number, warp.constant(0))
            copy(number // rest, number % rest + wholes * 8, mask)
        weight_pieces = self.points * 4 * self.image.dtype.itemsize // PIECE_BYTES
        warp.copy_to_shared(
            place + self.points * self.pitch + warp.lane * PIECE_BYTES,
            weights,
            first_point * 4 + warp.lane * piece_items,
            mask=None if weight_pieces == LANES else warp.lane < weight_pieces,
        )


class Part(NamedTuple):
    """Neighbouring numbers of 32 bits of each of eight lanes, which are loaded together."""

    first: int  # channel, of the first lane
    count: int  # numbers of a lane


class TensorCoreSums:
    """For 16 bits. A product has the rows of four points on its left side, loaded into it in one
    instruction, and on its right side the weights; its sums are those of the four tokens.

    Lane 4 i + j reads a piece of the row of point j, for each i another: the left sides of two
    products have its words 0 and 1, or 2 and 3, in rows i and i + 8. A register holds two
    neighbouring channels, where a product has two neighbours of its sum. So a word of channels has
    two columns of its own, one for each channel, in which weights stand beside zeros: of the right
    side the lane has column i, of token i // 2. Of the products it gets the same words, of token j.

    Tokens have their columns by whether x and y are odd, so those that stay have theirs already.
    """

    AHEAD = 4  # of the ring: more takes cache from the rows

    def __init__(self, warp: Warp, strip: Strip, ring: Ring):
        self.warp, self.strip, self.image, self.ring = warp, strip, strip.image, ring
        self._i, self._j = warp.lane >> 2, warp.lane & 3
        # Pieces n and n + 4 of four rows are in different banks.
        self._piece = (self._i >> 1) + (self._i & 1) * 4
        self._row = self._j * ring.pitch
        self._weight = self._j * 8 + (self._i >> 1) * 2 + ring.points * ring.pitch
        self._shift = (self._i & 1) * 16
        self._shared = strip.shared
        self._number = self._i * 2 + (self._j & 1)  # of the lanes that have kept sums
        self._counts = self._counts_of(self.image)

    @staticmethod
    def _counts_of(image: Image) -> list[int]:
        """How many of each product's four sums of a lane are wanted: all, or those in row i."""
        wholes, rest = divmod(image.channels, 64)
        pairs, single = divmod(-(-rest // 16), 2)
        return [4] * (2 * wholes + pairs) + [2] * single

    @classmethod
    def shared_bytes(cls, image: Image) -> int:
        """Of a warp: half of its lanes' sums, for each of half of the strip's tokens."""
        return STRIP // 2 * sum(cls._counts_of(image)) * WORD * LANES // 2

    @property
    def _wholes(self) -> range:
        """First channels of 64."""
        return range(0, self.image.channels // 64 * 64, 64)

    @property
    def _rests(self) -> list[tuple[int, int]]:
        """(first channel, words) of up to 16 channels, beyond."""
        first, end = self.image.channels // 64 * 64, self.image.channels
        return [(n, min(8, (end - n) // 2)) for n in range(first, end, 16)]

    def add(self, sums: list, place, n: int) -> list:
        """Adds the `n`-th four of the points that were copied to `place`."""
        warp, ring = self.warp, self.ring
        row = place + self._row
        offset, words = n * FOUR * ring.pitch, []
        for channel in self._wholes:
            address = row + self._piece * PIECE_BYTES
            words += warp.load_shared_words(address, 4, offset + channel * 2)
        for channel, count in self._rests:
            word = self._i if count == 8 else self._i & (count - 1)
            words += warp.load_shared_words(row + word * WORD, 1, offset + channel * 2)
        if len(self._rests) % 2:
            words.append(words[-1])
        right = [warp.load_shared_half(place + self._weight, n * FOUR * 8) << self._shift]
        unwanted = [warp.constant(0.0)] * 2
        return [
            warp.add_product(
                [*total, *unwanted][:4], words[2 * m : 2 * m + 2], right, self.image.dtype
            )[: len(total)]
            for m, total in enumerate(sums)
        ]

    def begin_row(self, y) -> list:
        """The sums of the strip's first token, and zeros for the one before."""
        zeros = [[self.warp.constant(0.0)] * count for count in self._counts]
        return self._begun((self._j & 1) == 0, y, self.warp.constant(0), zeros)

    def finish(self, x, y, sums: list, d_values) -> list:
        """Writes those of token (x, y), keeps those of the token below for the next row, and begins
        those of the token after the next."""
        warp, image, strip = self.warp, self.image, self.strip
        is_next = (self._j & 1) == (x & 1)
        own = is_next & (strip.first_x - 1 < x)
        finished = own & self._upper(y) & (x < image.w)
        first = strip.channel(y * image.w + x)
        numbers = [number for total in sums for number in total]
        words = [warp.pack(*numbers[n : n + 2], image.dtype) for n in range(0, len(numbers), 2)]
        for n, channel in enumerate(self._wholes):
            own_words = words[4 * n : 4 * n + 4]
            warp.store_words(d_values, first + self._piece * 8 + channel, own_words, mask=finished)
        rest_words = words[4 * len(self._wholes) :]
        for word, (channel, count) in zip(rest_words, self._rests, strict=False):
            mask = finished if count == 8 else finished & (self._i < count)
            warp.store_words(d_values, first + self._i * 2 + channel, [word], mask=mask)

        def keep(_):
            for n, total in enumerate(sums):
                warp.store_shared(self._place((x - strip.first_x) >> 1, n), *total)

        warp.when(own & ((self._j >> 1) != (y & 1)), keep)
        warp.wait_for_lanes()
        return self._begun(is_next, y, (x - strip.first_x + 2) >> 1, sums)

    def _upper(self, y):
        """Whether the lane has a token in row y, of the rows y and y + 1."""
        return (self._j >> 1) == (y & 1)

    def _place(self, token, n: int):
        """Of a product's sums, in shared memory; `token` is the number among the lane's own."""
        lanes_bytes = WORD * LANES // 2
        place = self._shared + (token & (STRIP // 2 - 1)) * (sum(self._counts) * lanes_bytes)
        own = self._number * (self._counts[n] * WORD)
        return place + own + sum(self._counts[:n]) * lanes_bytes

    def _begun(self, where, y, token, sums: list) -> list:
        """Where it says so, the sums of a token: what was kept in row y, zeros in row y + 1."""
        warp, zero, upper = self.warp, self.warp.constant(0.0), self._upper(y)
        begun = []
        for n, total in enumerate(sums):
            kept = warp.load_shared(self._place(token, n), len(total))
            kept = [warp.select(upper, x, zero) for x in kept]
            begun.append([warp.select(where, a, b) for a, b in zip(kept, total, strict=True)])
        return begun


class ScalarSums:
    """For float32. Eight lanes have a point's row, and what it adds to each of the four tokens; the
    lanes of the four points are added up in the end.
    """

    AHEAD = 3  # of the ring

    def __init__(self, warp: Warp, strip: Strip, ring: Ring):
        self.warp, self.strip, self.image, self.ring = warp, strip, strip.image, ring
        self._i, self._point = warp.lane & 7, warp.lane >> 3
        self._own = strip.shared + self._i * WORD
        self._count = self.image.channels // 8  # of numbers of a lane

    @staticmethod
    def shared_bytes(image: Image) -> int:
        """Of a warp: a row of sums for each token."""
        return STRIP * image.channels * WORD

    @property
    def _parts(self) -> list[Part]:
        left, first, parts = self._count, 0, []
        for count in (4, 2, 1):
            while left >= count:
                parts.append(Part(first, count))
                left, first = left - count, first + 8 * count
        return parts

    def add(self, sums: list, place, n: int) -> list:
        warp, ring, words = self.warp, self.ring, []
        row, offset = place + self._point * ring.pitch, n * FOUR * ring.pitch
        for part in self._parts:
            address = row + self._i * (part.count * WORD)
            words += warp.load_shared_words(address, part.count, offset + part.first * WORD)
        address = place + self._point * (4 * WORD) + ring.points * ring.pitch
        weights = warp.load_shared_words(address, 4, n * FOUR * 4 * WORD)
        row, weights = ([warp.as_float(word) for word in words] for words in (words, weights))
        return [
            [total + weight * x for total, x in zip(totals, row, strict=True)]
            for totals, weight in zip(sums, weights, strict=True)
        ]

    def begin_row(self, y) -> list:
        del y
        return [[self.warp.constant(0.0)] * self._count] * 4

    def finish(self, x, y, sums: list, d_values) -> list:
        warp, image, strip = self.warp, self.image, self.strip
        upper_left, upper_right, lower_left, lower_right = sums
        # Lanes of odd points take the lower token, those of even ones the upper one.
        lower = (self._point & 1) == 1
        partner, other = (warp.lane + n - (warp.lane & n) * 2 for n in (8, 16))
        totals = [
            warp.select(lower, b, a) + warp.shuffle(warp.select(lower, a, b), partner)
            for a, b in zip(upper_left, lower_left, strict=True)
        ]
        totals = [total + warp.shuffle(total, other) for total in totals]
        inside = (strip.first_x - 1 < x) & (x < image.w)
        place = self._own + ((x - strip.first_x) & (STRIP - 1)) * (image.channels * WORD)
        kept = [warp.load_shared(place + n * (8 * WORD)) for n in range(self._count)]
        warp.wait_for_lanes()

        def keep(_):
            for n, total in enumerate(totals):
                warp.store_shared(place + n * (8 * WORD), total)

        warp.when(inside & (self._point == 1), keep)
        warp.wait_for_lanes()
        finished = [a + b for a, b in zip(totals, kept, strict=True)]
        first, done = strip.channel(y * image.w + x), 0
        for part in self._parts:
            index = first + self._i * part.count + part.first
            own = finished[done : done + part.count]
            warp.store_words(d_values, index, own, mask=inside & (self._point == 0))
            done += part.count
        zeros = [warp.constant(0.0)] * self._count
        return [upper_right, zeros, lower_right, zeros]


def sums_of(image: Image) -> type:
    return TensorCoreSums if image.dtype.itemsize == 2 else ScalarSums
