"""Where `row_products.py` has the channels of tokens in shared memory, and how lanes find them.

A token's first 64 channels are eight pieces of 16 bytes in a line of 128, of which each piece takes
the same four of the 32 banks in every line. The pieces of a token's line are in an order that
depends on whether its x and its y are odd, so that any four tokens around a point have the same two
pieces in all eight places: eight lanes that load those meet no two in a bank. The eight channels
beyond 64, if there are any, are in lines of their own.
"""

from typing import NamedTuple

from pallas_kernels.deformable_conv.group import Group, Share
from pallas_kernels.deformable_conv.image import Image
from pallas_kernels.deformable_conv.inner_corners import Corners
from pallas_kernels.deformable_conv.launch import MAX_SHARED_BYTES
from pallas_kernels.deformable_conv.point_rows import WORD
from pallas_kernels.deformable_conv.warp import LANES, Warp
from pallas_kernels.deformable_conv.windows import COPY_BYTES, Window, window_bytes

CHANNELS = 64  # of a line
REST = 8  # channels beyond them
LINE_BYTES = 128
PIECES = LINE_BYTES // COPY_BYTES  # of a line
PIECE = 8  # channels
ODD_X, ODD_Y = 2 * COPY_BYTES, 4 * COPY_BYTES  # by which a piece's place differs
HALF = LINE_BYTES // 2
LINES = LANES // PIECES  # that a warp copies in one instruction
LINES_AT_A_TIME = 4 * LINES  # whose addresses are computed while others are on the way
TILES_PER_WARP = 2  # of a block that has a window


class Layout(NamedTuple):
    image: Image
    num_warps: int
    own_bytes: int  # of shared memory, for each warp

    @property
    def rest(self) -> bool:
        return self.image.channels > CHANNELS

    @property
    def token_bytes(self) -> int:
        return LINE_BYTES + (COPY_BYTES if self.rest else 0)

    @property
    def room(self) -> int:
        """Tokens."""
        return (MAX_SHARED_BYTES - self.num_warps * self.own_bytes) // self.token_bytes

    def pitch(self, width):
        """Tokens from a row of a window to the next.

        With a rest, such that the rests of four tokens around a point are in different banks.
        """
        return (width + 1) // 4 * 4 + 2 if self.rest else width

    def size(self, window: Window):
        """Tokens that a window takes."""
        return self.pitch(window.width) * window.height

    @property
    def share(self) -> Share:
        image = self.image
        whole = self.size(Window(0, 0, image.w, image.h)) <= self.room
        return Share(image, self.num_warps, whole, TILES_PER_WARP)

    @property
    def tokens(self) -> int:
        """For which there is room in a block's shared memory."""
        image = self.image
        return self.size(Window(0, 0, image.w, image.h)) if self.share.whole else self.room

    @property
    def rows_bytes(self) -> int:
        return window_bytes(self.tokens * self.token_bytes, self.num_warps)

    @property
    def shared_bytes(self) -> int:
        return self.rows_bytes + self.num_warps * self.own_bytes

    def scratch(self, shared, warp: Warp):
        """The address of the warp's own part."""
        return shared + self.rows_bytes + warp.warp * self.own_bytes


def copy_window(group: Group, layout: Layout, shared, values, window: Window) -> None:
    """Begins to copy a window's tokens to shared memory, shared out by rows among the warps."""
    warp, image = group.warp, group.image
    pitch = layout.pitch(window.width)
    own_line, piece = warp.lane // PIECES, warp.lane % PIECES

    def row(number):
        y = window.y + number
        first = group.channel(y * image.w + window.x)
        token_step = image.groups * image.channels
        odd = ((own_line + window.x) & 1) * ODD_X + (y & 1) * ODD_Y
        line = shared + number * pitch * LINE_BYTES + ((piece * COPY_BYTES) ^ odd)
        rest = shared + layout.tokens * LINE_BYTES + number * pitch * COPY_BYTES

        def copy_lines(step, _):
            for n in range(LINES_AT_A_TIME // LINES):
                x = step * LINES_AT_A_TIME + n * LINES + own_line
                channel = first + x * token_step + piece * PIECE
                copy(x, line + x * LINE_BYTES, channel, LINES_AT_A_TIME)

        def copy_rests(step, _):
            x = step * LANES + warp.lane
            copy(x, rest + x * COPY_BYTES, first + x * token_step + CHANNELS, LANES)

        def copy(x, address, channel, tokens_at_a_time):
            whole = isinstance(window.width, int) and window.width % tokens_at_a_time == 0
            mask = None if whole else x < window.width
            warp.copy_to_shared(address, values, channel, mask=mask)

        warp.loop((window.width + (LINES_AT_A_TIME - 1)) // LINES_AT_A_TIME, copy_lines)
        if layout.rest:
            warp.loop((window.width + (LANES - 1)) // LANES, copy_rests)

    def rows(step, _):
        number = step * warp.num_warps + warp.warp
        warp.when(number < window.height, lambda _: row(number))

    warp.loop((window.height + (warp.num_warps - 1)) // warp.num_warps, rows)


class Lane(NamedTuple):
    """What a lane reads of the four tokens around any point."""

    right: object  # of which token: 1 or 0
    below: object
    piece: object  # of its line; and `half`
    word: object  # of its rest, the first


class SharedRows:
    """Rows of values in shared memory, of a window of the image.

    A point's code tells each lane where it finds its part of the four tokens.
    """

    def __init__(self, layout: Layout, shared, window: Window, lane: Lane):
        self._window, self._pitch = window, layout.pitch(window.width)
        token = lane.below * self._pitch + lane.right
        self._turn = (lane.piece * COPY_BYTES) ^ (lane.right * ODD_X) ^ (lane.below * ODD_Y)
        self._line = token * LINE_BYTES + shared
        rest = shared + layout.tokens * LINE_BYTES
        self._rest = token * COPY_BYTES + lane.word * WORD + rest

    def code(self, corners: Corners):
        x, y = corners.x - self._window.x, corners.y - self._window.y
        odd = (corners.x & 1) * ODD_X + (corners.y & 1) * ODD_Y
        return (y * self._pitch + x) * LINE_BYTES + odd

    def load(self, warp: Warp, code, half: int = 0) -> list:
        """Four words, of the piece or of the one that is half a line from it."""
        place = code ^ self._turn
        place = (place ^ HALF) if half else place
        return warp.load_shared_words(place + self._line, 4, 0)

    def load_rest(self, warp: Warp, code, count: int) -> list:
        """That many words of the rest."""
        place = (code // LINE_BYTES) * COPY_BYTES
        return warp.load_shared_words(place + self._rest, count, 0)


class GlobalRows:
    """The same where they are in global memory: [B, tokens, G, C]."""

    def __init__(self, group: Group, values, lane: Lane):
        self._group, self._values = group, values
        image = group.image
        token = (lane.below * image.w + lane.right) * (image.groups * image.channels)
        self._line = token + lane.piece * PIECE
        self._rest = token + lane.word * 2 + CHANNELS

    def code(self, corners: Corners):
        return self._group.channel(corners.y * self._group.image.w + corners.x)

    def load(self, warp: Warp, code, half: int = 0) -> list:
        return warp.load_words(self._values, code + self._line + half * (CHANNELS // 2), 4)

    def load_rest(self, warp: Warp, code, count: int) -> list:
        return warp.load_words(self._values, code + self._rest, count)
