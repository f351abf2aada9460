"""`warp.Warp` on NumPy arrays: what a GPU would compute, for tests on machines that have none."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_conv.scalars import evaluate
from pallas_kernels.deformable_conv.warp import LANES


class SimulatedWarp:
    """All warps of all blocks at once; lanes' values are arrays [blocks, warps, lanes].

    References are arrays. Reading or writing outside of one is an error.
    """

    def __init__(self, num_blocks: int, num_warps: int, shared_bytes: int):
        self.num_warps = num_warps
        block, warp, lane = np.indices((num_blocks, num_warps, LANES), dtype=np.int32)
        self.block, self.warp, self.lane = block, warp, lane
        self.thread = warp * LANES + lane
        self._shared = np.zeros((num_blocks, shared_bytes), np.uint8)
        self._active = np.ones(self.lane.shape, bool)  # lanes that are not in a branch not taken

    def constant(self, number):
        kind = np.float32 if isinstance(number, float) else np.int32
        return np.full(self.lane.shape, number, kind)

    def apply(self, function: Callable, *args):
        return evaluate(function, args, _SCALARS, lambda x: x.dtype)

    def select(self, condition, a, b):
        return np.where(condition, a, b)

    def shuffle(self, x, source):
        return np.take_along_axis(x, np.broadcast_to(source, x.shape), axis=-1)

    def permute(self, x, selector):
        result = np.zeros_like(x)
        for n in range(4):
            byte = selector >> (4 * n) & 7
            bits = x >> np.where(byte < 4, 8 * byte, 0) & 0xFF
            result |= np.where(byte < 4, bits, 0) << (8 * n)
        return result

    def pack(self, low, high, dtype):
        pair = np.stack([low, high], axis=-1).astype(dtype)
        return pair.view(np.int32)[..., 0]

    def unpack(self, pair, dtype):
        numbers = np.ascontiguousarray(pair)[..., None].view(dtype).astype(np.float32)
        return numbers[..., 0], numbers[..., 1]

    def as_float(self, bits):
        return np.ascontiguousarray(bits).view(np.float32)

    def opaque(self, numbers):
        return numbers

    def rank(self, ref) -> int:
        return ref.ndim

    def dtype(self, ref) -> np.dtype:
        return ref.dtype

    def item_bytes(self, ref) -> int:
        return ref.itemsize

    def load_words(self, ref, index, count: int):
        ref, index = ref.reshape(-1), np.where(self._active, index, 0)
        each = 4 // ref.itemsize
        assert not (index % (each * count)).any(), "not aligned"
        at = _inside(ref, index[..., None] + np.arange(each * count))
        return list(np.moveaxis(np.ascontiguousarray(ref[at]).view(np.int32), -1, 0))

    def store_words(self, ref, index, words, *, mask):
        numbers = np.stack([np.ascontiguousarray(x).view(np.int32) for x in words], axis=-1)
        self.store(ref, index, *np.moveaxis(numbers.view(ref.dtype), -1, 0), mask=mask)

    def load_half(self, ref, index):
        ref, index = ref.reshape(-1), np.where(self._active, index, 0)
        return ref[_inside(ref, index)].view(np.uint16).astype(np.int32)

    def store_half(self, ref, index, bits, *, mask):
        self.store(ref, index, bits.astype(np.uint16).view(ref.dtype), mask=mask)

    def load(self, ref, index, count: int = 1):
        ref, index = ref.reshape(-1), np.where(self._active, index, 0)
        numbers = tuple(ref[_inside(ref, index + i)].astype(np.float32) for i in range(count))
        return numbers if count > 1 else numbers[0]

    def load_pair(self, ref, index):
        ref, index = ref.reshape(-1), np.where(self._active, index, 0)
        if ref.itemsize == 4:
            return ref[_inside(ref, index)].view(np.int32)
        assert not (index % 2).any(), "not aligned"
        return np.stack([ref[_inside(ref, index + i)] for i in range(2)], -1).view(np.int32)[..., 0]

    def store(self, ref, index, *numbers, mask):
        ref = ref.reshape(-1)
        mask = self._active & (True if mask is None else mask)
        assert not (index[mask] % len(numbers)).any(), "not aligned"
        for i, number in enumerate(numbers):
            ref[_inside(ref, index[mask] + i)] = number[mask].astype(ref.dtype)

    def shared_memory(self, ref):
        del ref
        return self.constant(0)

    def store_pair(self, ref, index, pair, *, mask):
        numbers = np.ascontiguousarray(pair)[..., None].view(ref.dtype)
        self.store(ref, index, *np.moveaxis(numbers, -1, 0), mask=mask)

    def copy_to_shared(self, address, ref, index, *, mask, again: bool = False):
        del again
        ref = ref.reshape(-1)
        mask = self._active & (True if mask is None else mask)
        index = index[mask][:, None] + np.arange(16 // ref.itemsize)
        assert not (index[:, 0] * ref.itemsize % 16).any(), "not aligned"
        where = self._bytes(self.block[mask], address[mask])
        self._shared[where] = ref[_inside(ref, index)].view(np.uint8)

    def wait_for_copies(self):
        pass

    def wait_for_own_copies(self):
        pass

    def load_shared(self, address, count: int = 1):
        words = self._words(address, count)
        numbers = [self._shared.view(np.float32)[self.block, word] for word in words]
        return numbers if count > 1 else numbers[0]

    def load_shared_where(self, mask, address, otherwise):
        return np.where(mask, self.load_shared(np.where(mask, address, 0)), otherwise)

    def store_shared_where(self, mask, address, number):
        def store(_):
            self.store_shared(address, number)

        self.when(mask, store)

    def load_shared_bits(self, address):
        return self.load_shared_words(address, 1, 0)[0]

    def load_shared_words(self, address, count: int, offset: int):
        words = self._words(np.where(self._active, address, -offset) + offset, count)
        return [self._shared.view(np.int32)[self.block, word] for word in words]

    def load_shared_words_where(self, mask, address, count: int):
        words = self.load_shared_words(np.where(mask, address, 0), count, 0)
        return [np.where(mask, word, -1) for word in words]  # else not a number

    def load_shared_half(self, address, offset: int):
        address = np.where(self._active, address + offset, 0)
        assert not (address % 2).any(), "not aligned"
        assert address.min() >= 0 and address.max() + 2 <= self._shared.shape[1], "outside"
        return self._shared.view(np.uint16)[self.block, address // 2].astype(np.int32)

    def store_shared(self, address, *numbers):
        for word, number in zip(self._words(address, len(numbers)), numbers, strict=True):
            place = self.block[self._active], word[self._active]
            self._shared.view(np.int32)[place] = number.view(np.int32)[self._active]

    def store_shared_half(self, address, bits):
        address = address[self._active]
        assert not (address % 2).any(), "not aligned"
        assert address.min() >= 0 and address.max() + 2 <= self._shared.shape[1], "outside"
        place = self.block[self._active], address // 2
        self._shared.view(np.uint16)[place] = bits[self._active].astype(np.uint16)

    def _words(self, address, count: int):
        address = np.where(self._active, address, 0)
        assert not (address % (4 * count)).any(), "not aligned"
        assert address.min() >= 0 and address.max() + 4 * count <= self._shared.shape[1], "outside"
        return [address // 4 + i for i in range(count)]

    def wait_for_lanes(self):
        pass

    def wait_for_block(self):
        pass

    def ballot(self, condition):
        bits = np.packbits(condition & self._active, axis=-1, bitorder="little")
        return np.broadcast_to(bits.view(np.int32), self.lane.shape)

    def union(self, bits):
        bits = np.where(self._active, bits, 0)
        return np.broadcast_to(np.bitwise_or.reduce(bits, axis=-1, keepdims=True), bits.shape)

    def lowest(self, x):
        x = np.where(self._active, x, np.iinfo(np.int32).max)
        return np.broadcast_to(x.min(axis=-1, keepdims=True), x.shape)

    def highest(self, x):
        x = np.where(self._active, x, np.iinfo(np.int32).min)
        return np.broadcast_to(x.max(axis=-1, keepdims=True), x.shape)

    def bit(self, n):
        inside = n.view(np.uint32) < 32
        return np.where(inside, np.int32(1) << np.where(inside, n, 0), 0).astype(np.int32)

    def below(self, a, b):
        return np.ascontiguousarray(a).view(np.uint32) < np.ascontiguousarray(b).view(np.uint32)

    def popcount(self, bits):
        return np.bitwise_count(bits.view(np.uint32)).astype(np.int32)

    def match(self, x):
        same = (x[..., :, None] == x[..., None, :]) & self._active[..., None, :]
        return np.packbits(same, axis=-1, bitorder="little").view(np.int32)[..., 0]

    def nth_bit(self, bits, n):
        is_set = bits[..., None] >> np.arange(LANES) & 1
        found = is_set & (np.cumsum(is_set, axis=-1) == n[..., None] + 1)
        return np.where(found.any(axis=-1), found.argmax(axis=-1), -1).astype(np.int32)

    def load_matrices(self, address, *, offset: int, count: int, transposed: bool):
        lanes = slice(0, 8 * count)
        address = np.where(self._active, address, -offset)
        where = self._bytes(self.block[..., lanes], address[..., lanes] + offset)
        matrices = self._shared[where].view(np.uint16)
        matrices = matrices.reshape(*self.lane.shape[:2], count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        words = np.ascontiguousarray(matrices).view(np.int32)
        return [words[:, :, n].reshape(self.lane.shape) for n in range(count)]

    def add_product(self, total, left, right, dtype):
        left, right = ([_matrix(x, dtype) for x in fragment] for fragment in (left, right))
        rows = [np.concatenate(left[i::2], axis=-1) for i in range(2)]
        right = np.concatenate(right, axis=-1).swapaxes(-1, -2)
        product = np.concatenate(rows, axis=-2) @ right
        product = product.reshape(*product.shape[:-2], 2, 8, 4, 2)
        return [
            total[2 * i + j] + product[..., i, :, :, j].reshape(self.lane.shape)
            for i in range(2)
            for j in range(2)
        ]

    def when(self, condition, body: Callable, carry=()):
        outside, self._active = self._active, self._active & condition
        if self._active.any():
            after = body(carry)
            if jax.tree.leaves(carry):
                carry = jax.tree.map(lambda x, y: np.where(self._active, x, y), after, carry)
        self._active = outside
        return carry

    def loop(self, count, body: Callable, carry=()):
        dynamic = not isinstance(count, int)
        for i in range(int(count.max()) if dynamic else count):
            now = self.constant(i)
            if dynamic:
                carry = self.when(now < count, functools.partial(body, now), carry)
            else:
                carry = body(now, carry)
        return carry

    def _bytes(self, block, address):
        assert not (address % 16).any(), "not aligned"
        where = address[..., None] + np.arange(16)
        assert where.min(initial=0) >= 0 and where.max(initial=0) < self._shared.shape[1], "outside"
        return block[..., None], where


def _inside(ref, index):
    assert index.min(initial=0) >= 0 and index.max(initial=0) < ref.size, "outside"
    return index


def _matrix(register, dtype):
    """[..., 8, 8] float32 of a register: lane 4 i + j has entries 2 j and 2 j + 1 of row i."""
    pairs = np.ascontiguousarray(register)[..., None].view(dtype).astype(np.float32)
    return pairs.reshape(*register.shape[:-1], 8, 8)


def _no_params(function: Callable) -> Callable:
    return lambda *args, **params: function(*args)


_SCALARS = {
    name: _no_params(function)
    for name, function in {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "neg": np.negative,
        "and": np.logical_and,
        "eq": np.equal,
        "lt": np.less,
        "ge": np.greater_equal,
        "max": np.maximum,
        "min": np.minimum,
        "abs": np.abs,
        "square": np.square,
        "floor": np.floor,
        "ceil": np.ceil,
        "exp2": np.exp2,
        "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
        "select_n": lambda condition, if_false, if_true: np.where(condition, if_true, if_false),
    }.items()
} | {
    "convert_element_type": lambda x, *, new_dtype, **_: np.asarray(x).astype(jnp.dtype(new_dtype))
}
