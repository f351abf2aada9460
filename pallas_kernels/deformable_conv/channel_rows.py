"""How eight lanes share a query's channels in `row_gather.py`: what each loads, adds and stores."""

from typing import NamedTuple

from pallas_kernels.deformable_conv.group import Group, num_tiles
from pallas_kernels.deformable_conv.image import Image
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES
from pallas_kernels.deformable_conv.point_rows import QUERIES, WORD
from pallas_kernels.deformable_conv.warp import Warp

SHARERS = 8  # lanes that share a query's channels
LOAD_BYTES = 16  # at most, of one load
BANKS_BYTES = 128  # of all banks of shared memory


class Piece(NamedTuple):
    """Neighbouring channels of each of a query's lanes, which are loaded together."""

    first: int  # channel, of the first lane
    count: int


class Layout(NamedTuple):
    """What a block has in shared memory of some channels of a group's tokens."""

    image: Image
    num_warps: int
    own_bytes: int  # of shared memory, for each warp
    first: int  # channel
    channels: int

    @property
    def row_bytes(self) -> int:
        return self.channels * self.image.dtype.itemsize

    @property
    def halves(self) -> list["Layout"]:
        """Of half of the channels each, in eights; none if there are eight only.

        Nor where half of the channels of an image would fit: on a GPU only others were tried.
        """
        eights = self.channels // SHARERS
        half = (eights + 1) // 2 * SHARERS
        if eights == 1 or self.image.tokens * half * self.image.dtype.itemsize <= self._room:
            return []
        rest = self._replace(first=self.first + half, channels=self.channels - half)
        return [self._replace(channels=half), rest]

    @property
    def _room(self) -> int:
        """Bytes of shared memory for tokens."""
        return MAX_SHARED_BYTES - self.num_warps * self.own_bytes

    @property
    def pitch_bytes(self) -> int:
        """From a row of the image to the next.

        In a whole image, half a round of the banks beyond a multiple of one, if there is room: then
        the rests of the four tokens around a point are in different banks.
        """
        pitch = self.image.w * self.row_bytes
        padded = pitch + (BANKS_BYTES // 2 - pitch) % BANKS_BYTES
        return padded if self.whole and self.rest and padded * self.image.h <= self._room else pitch

    @property
    def whole(self) -> bool:
        """Whether a block has an image, else a band for one tile of queries a warp."""
        all_channels = self.channels == self.image.channels
        return all_channels and self.image.tokens * self.row_bytes <= self._room

    @property
    def band(self) -> int:
        """Tokens for which there is room."""
        return self._room // self.row_bytes

    @property
    def tokens_bytes(self) -> int:
        """Of shared memory."""
        return self.image.h * self.pitch_bytes if self.whole else self._room

    @property
    def parts(self) -> int:
        """Blocks that share an image."""
        return 1 if self.whole else -(-num_tiles(self.image) // self.num_warps)

    @property
    def shared_bytes(self) -> int:
        return self.tokens_bytes + self.num_warps * self.own_bytes

    @property
    def pieces(self) -> list[Piece]:
        """Of the channels, but the last eight of an odd number of eights."""
        left, first, pieces = self.channels // SHARERS, 0, []
        left -= left % 2
        count = LOAD_BYTES // self.image.dtype.itemsize
        while left:
            while count > left:
                count //= 2
            pieces.append(Piece(first, count))
            left, first = left - count, first + count * SHARERS
        return pieces

    @property
    def rest(self) -> bool:
        """Whether there are eight channels that are in no piece.

        They are few for eight lanes, which therefore share the eights of all four corners.
        """
        return self.channels // SHARERS % 2 == 1


class Four(NamedTuple):
    """What a lane has of the rows of four tokens, in float32; of the layout's channels."""

    rows: list  # of each row, the channels of the pieces
    rest: list  # of one row, four channels of the last eight; may be empty


class Rows:
    """Rows of channels, as the lanes of a query have them."""

    def __init__(self, group: Group, layout: Layout):
        self.group, self.layout = group, layout
        self.share = share = group.warp.lane & (SHARERS - 1)
        self._firsts = [share * piece.count + piece.first for piece in layout.pieces]
        # Lanes 2 n and 2 n + 1 have the rest of the row of corner n.
        self._own_corner = share >> 1
        last = layout.channels - SHARERS
        self._own_first = (share & 1) * 4 + last
        # Of which each has one in the end, see `sum_of_rest`.
        self._own_channel = self._own_first + (share >> 1 & 1) * 2 + (share >> 2)

    def channel(self, token):
        """Number of the token's first channel of the layout, in arrays [B, tokens, G, C]."""
        return self.group.channel(token) + self.layout.first

    def of_token(self, ref, token) -> Four:
        """The one row of `ref`, and its rest."""
        channel = self.channel(token)
        rest = self._load(ref, channel + self._own_first, 4) if self.layout.rest else []
        return Four([self._load_pieces(ref, channel, 0)], rest)

    def of_corners(self, values, token) -> Four:
        """The rows of a token, the next, and the two below."""
        channel = self.channel(token)
        step = self.layout.image.groups * self.layout.image.channels
        neighbours, own_neighbour = self._neighbours(step, self.layout.image.w * step)
        rows = [self._load_pieces(values, channel, x) for x in neighbours]
        rest = []
        if self.layout.rest:
            index = channel + own_neighbour + self._own_first
            rest = self._load(values, index, 4)
        return Four(rows, rest)

    def of_corners_in_band(self, address) -> Four:
        """The same in shared memory, where the first row begins at `address`."""
        warp, layout = self.group.warp, self.layout
        size = layout.image.dtype.itemsize

        def load(place, count: int, offset: int) -> list:
            words = warp.load_shared_words(place, count * size // WORD, offset)
            return self._numbers(words)

        neighbours, own_neighbour = self._neighbours(layout.row_bytes, layout.pitch_bytes)
        places = [address + first * size for first in self._firsts]
        rows = [
            [
                number
                for place, piece in zip(places, layout.pieces, strict=True)
                for number in load(place, piece.count, x)
            ]
            for x in neighbours
        ]
        rest = []
        if layout.rest:
            own = own_neighbour + self._own_first * size
            rest = load(address + own, 4, 0)
        return Four(rows, rest)

    def of_own_corner(self, numbers: list):
        """Of four lanes' numbers, one for each corner, that of which the lane has the rest."""
        warp = self.group.warp
        right, below = (self._own_corner & 1) == 1, (self._own_corner >> 1) == 1
        upper, lower = (warp.select(right, numbers[n + 1], numbers[n]) for n in (0, 2))
        return warp.select(below, lower, upper)

    def _neighbours(self, right: int, below: int):
        """How far the four tokens are, and that of which the lane has the rest."""
        own = (self.share >> 1 & 1) * right + (self.share >> 2) * below
        return (0, right, below, below + right), own

    def is_own_corner(self, n: int):
        return self._own_corner == n

    def sum_of_rest(self, totals: list):
        """The sum over corners of the one of the last eight channels that the lane stores."""
        warp = self.group.warp
        right, below = (self._own_corner & 1) == 1, (self._own_corner >> 1) == 1
        totals = halves(warp, totals, right, self.partner(2))
        return halves(warp, totals, below, self.partner(4))[0]

    def partner(self, n: int):
        """The number of the lane of which bit n differs."""
        lane = self.group.warp.lane
        return lane + n - (lane & n) * 2

    def store(self, ref, token, numbers: list, last) -> None:
        """Writes what a lane has of the token's row, and its one of the last eight channels."""
        warp, image = self.group.warp, self.layout.image
        channel, numbers = self.channel(token), iter(numbers)
        mask = None if image.tokens % QUERIES == 0 else token < image.tokens
        wide = image.dtype.itemsize == WORD
        for piece, first in zip(self.layout.pieces, self._firsts, strict=True):
            words = [next(numbers) for _ in range(piece.count)]
            if not wide:
                pairs = zip(words[::2], words[1::2], strict=True)
                words = [warp.pack(*pair, image.dtype) for pair in pairs]
            warp.store_words(ref, channel + first, words, mask=mask)
        if self.layout.rest:
            index = channel + self._own_channel
            if wide:
                warp.store_words(ref, index, [last], mask=mask)
            else:
                warp.store_half(ref, index, warp.pack(last, last, image.dtype), mask=mask)

    def _load_pieces(self, ref, channel, step: int) -> list:
        pieces = zip(self._firsts, self.layout.pieces, strict=True)
        return [
            number
            for first, piece in pieces
            for number in self._load(ref, channel + first + step, piece.count)
        ]

    def _load(self, ref, index, count: int) -> list:
        words = count * self.layout.image.dtype.itemsize // WORD
        return self._numbers(self.group.warp.load_words(ref, index, words))

    def _numbers(self, words: list) -> list:
        warp, dtype = self.group.warp, self.layout.image.dtype
        if dtype.itemsize == WORD:
            return [warp.as_float(word) for word in words]
        return [x for word in words for x in warp.unpack(word, dtype)]


def halves(warp: Warp, totals: list, upper, partner) -> list:
    """Half of the totals of two lanes: the second half of the sums if `upper`, else the first."""
    half = len(totals) // 2
    return [
        warp.select(upper, b, a) + warp.shuffle(warp.select(upper, a, b), partner)
        for a, b in zip(totals[:half], totals[half:], strict=True)
    ]
