"""Where `row_products.py` has the channels of tokens in shared memory, and how lanes find them.

A token's channels are nine pieces of 16 bytes: 64 channels, and the rest, if there is one. As a
piece takes four of the 32 banks, the same piece of neighbouring tokens is one place of eight
further, and in the next row of the image an even number of places that is no multiple of four. So
the pieces n and n + 4 of any four tokens around a point are in different banks, and so are the even
pieces of two neighbours, or the odd ones, and the rests of four.
"""

from typing import NamedTuple

from pallas_kernels.deformable_conv.group import Group
from pallas_kernels.deformable_conv.image import Image
from pallas_kernels.deformable_conv.inner_corners import Corners
from pallas_kernels.deformable_conv.point_rows import WORD
from pallas_kernels.deformable_conv.warp import LANES, Warp

CHANNELS = 64
REST = 8  # channels beyond them
PIECE = 8  # channels
PIECE_BYTES = 16
TOKEN_BYTES = 9 * PIECE_BYTES
CODES_BYTES = 2 * LANES  # of a table
PIECES_AT_A_TIME = 4  # whose addresses are computed while others are on the way


class Layout(NamedTuple):
    image: Image
    num_warps: int
    own_bytes: int  # of shared memory, for each warp
    sources: int = 1  # images that a block has

    @property
    def rest(self) -> bool:
        return self.image.channels > CHANNELS

    @property
    def pitch(self) -> int:
        """Tokens from a row of the image to the next: even, but no multiple of four."""
        return (self.image.w + 1) // 4 * 4 + 2

    @property
    def tokens_bytes(self) -> int:
        return self.pitch * self.image.h * TOKEN_BYTES

    @property
    def shared_bytes(self) -> int:
        return self.sources * self.tokens_bytes + self.num_warps * self.own_bytes

    def scratch(self, shared, warp: Warp):
        """The address of the warp's own part."""
        return shared + self.sources * self.tokens_bytes + warp.warp * self.own_bytes


def copy_image(group: Group, layout: Layout, shared, values) -> None:
    """Begins to copy all tokens to shared memory."""
    warp, image = group.warp, group.image
    pieces_of_token = image.channels // PIECE
    pieces = image.tokens * pieces_of_token
    threads = warp.num_warps * LANES

    def copy(step, _):
        for n in range(PIECES_AT_A_TIME):
            piece = (step * PIECES_AT_A_TIME + n) * threads + warp.thread
            token, own = piece // pieces_of_token, piece % pieces_of_token
            place = (token // image.w) * layout.pitch + token % image.w
            warp.copy_to_shared(
                shared + place * TOKEN_BYTES + own * PIECE_BYTES,
                values,
                group.channel(token) + own * PIECE,
                mask=None if pieces % (threads * PIECES_AT_A_TIME) == 0 else piece < pieces,
            )

    warp.loop(-(-pieces // (threads * PIECES_AT_A_TIME)), copy)


class Lane(NamedTuple):
    """What a lane reads of the four tokens around any point."""

    right: object  # of which token: 1 or 0
    below: object
    piece: object  # and maybe the next
    word: object  # of its rest, the first


class TokenRows:
    """The rows of values in shared memory.

    A point's code, which each lane computes for its own query's points, tells all lanes where they
    find their part of the four tokens. Codes of 32 queries are together in a table.
    """

    def __init__(self, warp: Warp, layout: Layout, shared, lane: Lane):
        self._warp, self._pitch = warp, layout.pitch
        token = shared + (lane.below * layout.pitch + lane.right) * TOKEN_BYTES
        self._pieces = token + lane.piece * PIECE_BYTES
        self._rest = token + lane.word * WORD + CHANNELS // PIECE * PIECE_BYTES

    def store_code(self, table, corners: Corners) -> None:
        """That of a point of the lane's query."""
        place = table + self._warp.lane * (CODES_BYTES // LANES)
        self._warp.store_shared_half(place, corners.y * self._pitch + corners.x)

    def load_codes(self, table, query, offset: int) -> list:
        """Of four queries from number `query`, of the table `offset` bytes further."""
        words = self._warp.load_shared_words(table + query * (CODES_BYTES // LANES), 2, offset)
        return [code for word in words for code in (word & 0xFFFF, word >> 16)]

    def load(self, code, number: int = 0) -> list:
        """The four words of the lane's piece, or of the one `number` further."""
        place = code * TOKEN_BYTES + self._pieces
        return self._warp.load_shared_words(place, 4, number * PIECE_BYTES)

    def load_rest(self, code, count: int) -> list:
        """That many words of the rest."""
        return self._warp.load_shared_words(code * TOKEN_BYTES + self._rest, count, 0)
