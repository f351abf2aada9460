"""Where `row_products.py` has the channels of tokens in shared memory, and how lanes find them.

A token's channels are nine pieces of 16 bytes: 64 channels, and the rest, if there is one. As a
piece takes four of the 32 banks, the same piece of neighbouring tokens is one place of eight
further, and in the next row of the image an even number of places that is no multiple of four. So
the pieces n and n + 4 of any four tokens around a point are in different banks, and so are the even
pieces of two neighbours, or the odd ones, and the rests of four.
"""

from typing import NamedTuple

from pallas_kernels.deformable_conv.group import Group, Share
from pallas_kernels.deformable_conv.image import Image
from pallas_kernels.deformable_conv.inner_corners import Corners
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES
from pallas_kernels.deformable_conv.point_rows import WORD
from pallas_kernels.deformable_conv.warp import LANES, Warp
from pallas_kernels.deformable_conv.windows import Window, window_bytes

CHANNELS = 64
REST = 8  # channels beyond them
PIECE = 8  # channels
PIECE_BYTES = 16
TOKEN_BYTES = 9 * PIECE_BYTES
PIECES_AT_A_TIME = 4  # whose addresses are computed while others are on the way


class Layout(NamedTuple):
    image: Image
    num_warps: int
    tiles_per_warp: int  # if a block has a window
    own_bytes: int  # of shared memory, for each warp

    @property
    def rest(self) -> bool:
        return self.image.channels > CHANNELS

    @property
    def room(self) -> int:
        """Tokens."""
        return (MAX_SHARED_BYTES - self.num_warps * self.own_bytes) // TOKEN_BYTES

    def pitch(self, width):
        """Tokens from a row of a window to the next: even, but no multiple of four."""
        return (width + 1) // 4 * 4 + 2

    def size(self, window: Window):
        """Tokens that a window takes."""
        return self.pitch(window.width) * window.height

    @property
    def share(self) -> Share:
        image = self.image
        whole = self.size(Window(0, 0, image.w, image.h)) <= self.room
        return Share(image, self.num_warps, whole, self.tiles_per_warp)

    @property
    def tokens(self) -> int:
        """For which there is room in a block's shared memory."""
        image = self.image
        return self.size(Window(0, 0, image.w, image.h)) if self.share.whole else self.room

    @property
    def tokens_bytes(self) -> int:
        return window_bytes(self.tokens * TOKEN_BYTES, self.num_warps)

    @property
    def shared_bytes(self) -> int:
        return self.tokens_bytes + self.num_warps * self.own_bytes

    def scratch(self, shared, warp: Warp):
        """The address of the warp's own part."""
        return shared + self.tokens_bytes + warp.warp * self.own_bytes


def copy_window(group: Group, layout: Layout, shared, values, window: Window) -> None:
    """Begins to copy a window's tokens to shared memory, shared out by rows among the warps."""
    warp, image = group.warp, group.image
    pieces_of_token = image.channels // PIECE
    pieces = window.width * pieces_of_token
    at_a_time = PIECES_AT_A_TIME * LANES
    full = isinstance(pieces, int) and pieces % at_a_time == 0

    def row(number):
        place = shared + number * (layout.pitch(window.width) * TOKEN_BYTES)
        first = group.channel((window.y + number) * image.w + window.x)

        def copy(step, _):
            for n in range(PIECES_AT_A_TIME):
                piece = step * at_a_time + n * LANES + warp.lane
                x, own = piece // pieces_of_token, piece % pieces_of_token
                warp.copy_to_shared(
                    place + x * TOKEN_BYTES + own * PIECE_BYTES,
                    values,
                    first + x * (image.groups * image.channels) + own * PIECE,
                    mask=None if full else piece < pieces,
                )

        warp.loop((pieces + (at_a_time - 1)) // at_a_time, copy)

    def rows(step, _):
        number = step * warp.num_warps + warp.warp
        warp.when(number < window.height, lambda _: row(number))

    warp.loop((window.height + (warp.num_warps - 1)) // warp.num_warps, rows)


class Lane(NamedTuple):
    """What a lane reads of the four tokens around any point."""

    right: object  # of which token: 1 or 0
    below: object
    piece: object  # and maybe the next
    word: object  # of its rest, the first


class SharedRows:
    """Rows of values in shared memory, of a window of the image.

    A point's code, which each lane computes for its own query's points, tells all lanes where they
    find their part of the four tokens. Codes of several queries are together in a table.
    """

    def __init__(self, layout: Layout, shared, window: Window, lane: Lane):
        self._window, self._pitch = window, layout.pitch(window.width)
        token = shared + (lane.below * self._pitch + lane.right) * TOKEN_BYTES
        self._pieces = token + lane.piece * PIECE_BYTES
        self._rest = token + lane.word * WORD + CHANNELS // PIECE * PIECE_BYTES

    def store_code(self, warp: Warp, table, query, corners: Corners) -> None:
        x, y = corners.x - self._window.x, corners.y - self._window.y
        warp.store_shared_half(table + query * 2, y * self._pitch + x)

    def load_codes(self, warp: Warp, table, query, offset: int) -> list:
        """Of four queries from number `query`, of the table `offset` bytes further."""
        words = warp.load_shared_words(table + query * 2, 2, offset)
        return [code for word in words for code in (word & 0xFFFF, word >> 16)]

    def load(self, warp: Warp, code, number: int = 0) -> list:
        """The four words of the lane's piece, or of the one `number` further."""
        place = code * TOKEN_BYTES + self._pieces
        return warp.load_shared_words(place, 4, number * PIECE_BYTES)

    def load_rest(self, warp: Warp, code, count: int) -> list:
        """That many words of the rest."""
        return warp.load_shared_words(code * TOKEN_BYTES + self._rest, count, 0)


class GlobalRows:
    """The same where they are in global memory: [B, tokens, G, C]."""

    def __init__(self, group: Group, values, lane: Lane):
        self._group, self._values = group, values
        image = group.image
        token = (lane.below * image.w + lane.right) * (image.groups * image.channels)
        self._pieces = token + lane.piece * PIECE
        self._rest = token + lane.word * 2 + CHANNELS

    def store_code(self, warp: Warp, table, query, corners: Corners) -> None:
        token = corners.y * self._group.image.w + corners.x
        warp.store_shared(table + query * WORD, self._group.channel(token))

    def load_codes(self, warp: Warp, table, query, offset: int) -> list:
        return warp.load_shared_words(table + query * WORD, 4, offset)

    def load(self, warp: Warp, code, number: int = 0) -> list:
        return warp.load_words(self._values, code + self._pieces + number * PIECE, 4)

    def load_rest(self, warp: Warp, code, count: int) -> list:
        return warp.load_words(self._values, code + self._rest, count)
