"""`warp.Warp` on NumPy arrays: what a GPU would compute, for tests on machines that have none."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from pallas_kernels.deformable_conv.warp import LANES, evaluate


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

    def constant(self, number):
        kind = np.float32 if isinstance(number, float) else np.int32
        return np.full(self.lane.shape, number, kind)

    def apply(self, function: Callable, *args):
        with np.errstate(invalid="ignore", over="ignore"):
            return evaluate(function, args, _SCALARS, lambda x: x.dtype)

    def select(self, condition, a, b):
        return np.where(condition, a, b)

    def shuffle(self, x, source):
        return np.take_along_axis(x, np.broadcast_to(source, x.shape), axis=-1)

    def pack(self, low, high, dtype):
        pair = np.stack([low, high], axis=-1).astype(dtype)
        return pair.view(np.int32)[..., 0]

    def permute_bytes(self, x, selector):
        own = np.ascontiguousarray(x)[..., None].view(np.uint8)
        choices = np.concatenate([own, np.zeros_like(own)], axis=-1)
        digits = np.stack([(selector >> (4 * i)) & 7 for i in range(4)], axis=-1)
        return np.take_along_axis(choices, digits, axis=-1).view(np.int32)[..., 0]

    def rank(self, ref) -> int:
        return ref.ndim

    def load(self, ref, index, count: int = 1):
        ref = ref.reshape(-1)
        numbers = tuple(ref[_inside(ref, index + i)].astype(np.float32) for i in range(count))
        return numbers if count > 1 else numbers[0]

    def load_pair(self, ref, index):
        ref = ref.reshape(-1)
        assert not (index % 2).any(), "not aligned"
        return np.stack([ref[_inside(ref, index + i)] for i in range(2)], -1).view(np.int32)[..., 0]

    def store(self, ref, index, *numbers, mask):
        ref = ref.reshape(-1)
        mask = np.broadcast_to(True if mask is None else mask, self.lane.shape)
        assert not (index[mask] % len(numbers)).any(), "not aligned"
        for i, number in enumerate(numbers):
            ref[_inside(ref, index[mask] + i)] = number[mask].astype(ref.dtype)

    def shared_memory(self, ref):
        del ref
        return self.constant(0)

    def store_pair(self, ref, index, pair, *, mask):
        numbers = np.ascontiguousarray(pair)[..., None].view(ref.dtype)
        self.store(ref, index, numbers[..., 0], numbers[..., 1], mask=mask)

    def copy_to_shared(self, address, ref, index, *, mask):
        ref = ref.reshape(-1)
        mask = np.broadcast_to(True if mask is None else mask, self.lane.shape)
        index = index[mask][:, None] + np.arange(16 // ref.itemsize)
        assert not (index[:, 0] * ref.itemsize % 16).any(), "not aligned"
        where = self._bytes(self.block[mask], address[mask])
        self._shared[where] = ref[_inside(ref, index)].view(np.uint8)

    def wait_for_copies(self):
        pass

    def load_matrices(self, address, *, offset: int, count: int, transposed: bool):
        lanes = slice(0, 8 * count)
        where = self._bytes(self.block[..., lanes], address[..., lanes] + offset)
        matrices = self._shared[where].view(np.uint16)
        matrices = matrices.reshape(*self.lane.shape[:2], count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        words = np.ascontiguousarray(matrices).view(np.int32)
        return [words[:, :, n].reshape(self.lane.shape) for n in range(count)]

    def transpose(self, x):
        matrix = np.ascontiguousarray(x)[..., None].view(np.uint16).reshape(*x.shape[:-1], 8, 8)
        return np.ascontiguousarray(matrix.swapaxes(-1, -2)).view(np.int32).reshape(x.shape)

    def add_product(self, total, left, right, dtype):
        left, right = ([_matrix(x, dtype) for x in fragment] for fragment in (left, right))
        rows = [np.concatenate(left[i::2], axis=-1) for i in range(2)]
        product = np.concatenate(rows, axis=-2) @ np.concatenate(right, axis=-1).swapaxes(-1, -2)
        product = product.reshape(*product.shape[:-2], 2, 8, 4, 2)
        return [
            total[2 * i + j] + product[..., i, :, :, j].reshape(self.lane.shape)
            for i in range(2)
            for j in range(2)
        ]

    def loop(self, count: int, body: Callable, carry=()):
        for i in range(count):
            carry = body(self.constant(i), carry)
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
