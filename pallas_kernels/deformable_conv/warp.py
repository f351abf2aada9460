"""A warp of an NVIDIA GPU, instruction by instruction, for kernels in Pallas' Mosaic GPU.

`Warp` writes what 32 lanes do in lockstep into a kernel. Only a few instructions are spelled out:
those that move data between lanes and memories, and the tensor cores'. Arithmetic is ordinary JAX
on scalars, which `Warp.apply` translates for each lane. `simulated_warp.py` has the same methods on
NumPy arrays, so that kernels can be tested without a GPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from pallas_kernels.deformable_conv.lanes import SCALARS, Lanes, assemble, dtype_of, type_named
from pallas_kernels.deformable_conv.scalars import evaluate

LANES = 32
GLOBAL_MEMORY = 1  # LLVM's number of the address space
ALL_LANES = "0xffffffff"


class Warp:
    """One warp of a block of `num_warps`; of its lanes' values, arrays below mean `Lanes`."""

    def __init__(self, num_warps: int):
        self.num_warps = num_warps
        self.thread = Lanes(mosaic.thread_idx())  # in the block
        self.lane = self.thread & (LANES - 1)
        self.warp = Lanes(mosaic.warp_idx())  # in the block
        self.block = Lanes(arith.index_cast(type_named("i32"), gpu.block_id(gpu.Dimension.x)))

    # --- numbers -------------------------------------------------------------------------------

    def constant(self, number: int | float) -> Lanes:
        return Lanes(
            arith.constant(type_named("f32" if isinstance(number, float) else "i32"), number)
        )

    def apply(self, function: Callable, *args):
        """function(*args), of pytrees of lanes, for a function of JAX scalars."""
        return evaluate(function, args, SCALARS, dtype_of)

    def select(self, condition: Lanes, a: Lanes, b: Lanes) -> Lanes:
        return Lanes(arith.select(condition.value, a.value, b.value))

    def shuffle(self, x: Lanes, source: Lanes) -> Lanes:
        """x of the lane number `source`."""
        kind = "f" if x.is_float else "r"
        text = f"shfl.sync.idx.b32 $0, $1, $2, 0x1f, {ALL_LANES};"
        return assemble(text, x.value.type, f"={kind},{kind},r", x, source, ordered=True)

    def ballot(self, condition: Lanes) -> Lanes:
        """A bit for each lane: where the condition holds."""
        number = Lanes(arith.extui(type_named("i32"), condition.value))
        text = f"{{.reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, {ALL_LANES};}}"
        return assemble(text, type_named("i32"), "=r,r", number, ordered=True)

    def union(self, bits: Lanes) -> Lanes:
        """The bits that any lane has."""
        text = f"redux.sync.or.b32 $0, $1, {ALL_LANES};"
        return assemble(text, type_named("i32"), "=r,r", bits, ordered=True)

    def lowest(self, x: Lanes) -> Lanes:
        """The least of all lanes' integers."""
        text = f"redux.sync.min.s32 $0, $1, {ALL_LANES};"
        return assemble(text, type_named("i32"), "=r,r", x, ordered=True)

    def highest(self, x: Lanes) -> Lanes:
        text = f"redux.sync.max.s32 $0, $1, {ALL_LANES};"
        return assemble(text, type_named("i32"), "=r,r", x, ordered=True)

    def bit(self, n: Lanes) -> Lanes:
        """An integer of which bit n is set; 0 if, as an unsigned number, n is beyond 31."""
        return assemble("shl.b32 $0, 1, $1;", type_named("i32"), "=r,r", n)

    def below(self, a: Lanes, b: Lanes) -> Lanes:
        """a < b of integers as unsigned numbers."""
        return Lanes(arith.cmpi(arith.CmpIPredicate.ult, a.value, b.value))

    def popcount(self, bits: Lanes) -> Lanes:
        return assemble("popc.b32 $0, $1;", type_named("i32"), "=r,r", bits)

    def match(self, x: Lanes) -> Lanes:
        """A bit for each lane that has the same integer."""
        text = f"match.any.sync.b32 $0, $1, {ALL_LANES};"
        return assemble(text, type_named("i32"), "=r,r", x, ordered=True)

    def nth_bit(self, bits: Lanes, n: Lanes) -> Lanes:
        """The place of the set bit number n, counted from 0; -1 if there are no more."""
        return assemble("fns.b32 $0, $1, 0, $2;", type_named("i32"), "=r,r,r", bits, n + 1)

    def permute(self, x: Lanes, selector: Lanes) -> Lanes:
        """Bytes of x, the lowest first, by the four lowest hexadecimal digits of `selector`: a
        digit up to 3 is the number of a byte, and 4 to 7 stand for a zero."""
        return assemble("prmt.b32 $0, $1, 0, $2;", type_named("i32"), "=r,r,r", x, selector)

    def pack(self, low: Lanes, high: Lanes, dtype) -> Lanes:
        """Two float32 numbers in the 16 bits of `dtype` each."""
        text = f"cvt.rn.{_short(dtype)}x2.f32 $0, $1, $2;"
        return assemble(text, type_named("i32"), "=r,f,f", high, low)

    def unpack(self, pair: Lanes, dtype) -> tuple[Lanes, Lanes]:
        """The float32 numbers of two of `dtype`'s 16 bits."""
        if jnp.dtype(dtype) == jnp.bfloat16:
            return self.as_float(pair << 16), self.as_float(pair & -65536)
        text = "{.reg .f16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}"
        return tuple(assemble(text, [type_named("f32")] * 2, "=f,=f,r", pair))

    def as_float(self, bits: Lanes) -> Lanes:
        """The float32 number that has these bits."""
        return Lanes(arith.bitcast(type_named("f32"), bits.value))

    def opaque(self, numbers):
        """The same pytree; what is computed of it is not shared with what was computed before."""

        def move(x: Lanes) -> Lanes:
            kind, name = ("f", "f32") if x.is_float else ("r", "b32")
            return assemble(f"mov.{name} $0, $1;", x.value.type, f"={kind},{kind}", x, ordered=True)

        return jax.tree.map(move, numbers)

    # --- memory --------------------------------------------------------------------------------

    def rank(self, ref: ir.Value) -> int:
        return ir.MemRefType(ref.type).rank

    def dtype(self, ref: ir.Value) -> np.dtype:
        element = ir.MemRefType(ref.type).element_type
        names = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
        return jnp.dtype(names[str(element)])

    def item_bytes(self, ref: ir.Value) -> int:
        return self.dtype(ref).itemsize

    def load_words(self, ref: ir.Value, index: Lanes, count: int) -> list:
        """`count` (1, 2 or 4) neighbours of 32 bits from element `index` of the flattened `ref`."""
        pointer = _element_and_pointer(ref, index)[1]
        if count == 1:
            return [Lanes(llvm.load(type_named("i32"), pointer))]
        vector = ir.VectorType.get((count,), type_named("i32"))
        words = llvm.load(vector, pointer, alignment=4 * count)
        at = (arith.constant(type_named("i32"), i) for i in range(count))
        return [Lanes(llvm.extractelement(words, i)) for i in at]

    def store_words(self, ref: ir.Value, index: Lanes, words: list, *, mask: Lanes | None) -> None:
        """1, 2 or 4 numbers of 32 bits from element `index` of the flattened `ref` where `mask`
        says so; None: everywhere."""
        pointer = _element_and_pointer(ref, index)[1]
        value = words[0].value
        if len(words) > 1:
            value = llvm.mlir_undef(ir.VectorType.get((len(words),), value.type))
            for i, x in enumerate(words):
                value = llvm.insertelement(value, x.value, arith.constant(type_named("i32"), i))
        _where(mask, lambda: llvm.store(value, pointer, alignment=4 * len(words)))

    def load_half(self, ref: ir.Value, index: Lanes) -> Lanes:
        """A number of 16 bits of the flattened `ref`, as it is, above it zeros."""
        number = llvm.load(type_named("i16"), _element_and_pointer(ref, index)[1])
        return Lanes(arith.extui(type_named("i32"), number))

    def store_half(self, ref: ir.Value, index: Lanes, bits: Lanes, *, mask: Lanes | None) -> None:
        """The lower 16 bits into the flattened `ref` where `mask` says so; None: everywhere."""
        pointer = _element_and_pointer(ref, index)[1]
        number = arith.trunci(type_named("i16"), bits.value)
        _where(mask, lambda: llvm.store(number, pointer))

    def load(self, ref: ir.Value, index: Lanes, count: int = 1):
        """`count` (1 or 2) neighbours of the flattened `ref`, as float32."""
        element, pointer = _element_and_pointer(ref, index)
        if count == 1:
            return _to_float32(llvm.load(element, pointer))
        pair = llvm.load(ir.VectorType.get((2,), element), pointer)
        at = (arith.constant(type_named("i32"), i) for i in range(2))
        return tuple(_to_float32(llvm.extractelement(pair, i)) for i in at)

    def load_pair(self, ref: ir.Value, index: Lanes) -> Lanes:
        """Two neighbours of 16 bits, or one number of 32, of the flattened `ref`, as they are."""
        return Lanes(llvm.load(type_named("i32"), _element_and_pointer(ref, index)[1]))

    def shared_memory(self, ref: ir.Value) -> Lanes:
        """The address of the block's shared memory `ref`, in bytes."""
        return Lanes(llvm.ptrtoint(type_named("i32"), mosaic.memref_ptr(ref)))

    def store_pair(self, ref: ir.Value, index: Lanes, pair: Lanes, *, mask: Lanes | None) -> None:
        """Two neighbours of 16 bits, as they are, into the flattened `ref` where `mask`
        says so; None: everywhere."""
        pointer = _element_and_pointer(ref, index)[1]
        _where(mask, lambda: llvm.store(pair.value, pointer))

    def copy_to_shared(
        self,
        address: Lanes,
        ref: ir.Value,
        index: Lanes,
        *,
        mask: Lanes | None,
        again: bool = False,
    ) -> None:
        """Begins to copy 16 bytes; `wait_for_copies` ends all copies of the block.

        `again` says that others copy the same bytes: they stay in the L1 cache.
        """

        def copy():
            pointer = Lanes(llvm.ptrtoint(type_named("i64"), _element_and_pointer(ref, index)[1]))
            text = f"cp.async.{'ca' if again else 'cg'}.shared.global [$0], [$1], 16;"
            assemble(text, None, "r,l,~{memory}", address, pointer, ordered=True)

        _where(mask, copy)

    def load_shared(self, address: Lanes, count: int = 1) -> list:
        """`count` (1, 2 or 4) neighbouring float32 numbers at a byte address in shared memory."""
        width = f".v{count}" if count > 1 else ""
        names = ",".join(f"${i}" for i in range(count))
        return assemble(
            f"ld.shared{width}.f32 {'{' + names + '}' if width else names}, [${count}];",
            [type_named("f32")] * count if width else type_named("f32"),
            "=f," * count + "r,~{memory}",
            address,
            ordered=True,
        )

    def load_shared_where(self, mask: Lanes, address: Lanes, otherwise: Lanes) -> Lanes:
        """The float32 number at a byte address in shared memory where `mask` says so."""
        return assemble(
            "mov.f32 $0, $3; @$1 ld.shared.f32 $0, [$2];",
            type_named("f32"),
            "=&f,b,r,f,~{memory}",
            mask,
            address,
            otherwise,
            ordered=True,
        )

    def store_shared_where(self, mask: Lanes, address: Lanes, number: Lanes) -> None:
        """A float32 number at a byte address in shared memory where `mask` says so."""
        text = "@$0 st.shared.f32 [$1], $2;"
        assemble(text, None, "b,r,f,~{memory}", mask, address, number, ordered=True)

    def load_shared_bits(self, address: Lanes) -> Lanes:
        """32 bits at a byte address in shared memory."""
        return self.load_shared_words(address, 1, 0)[0]

    def load_shared_words(self, address: Lanes, count: int, offset: int) -> list:
        """`count` (1, 2 or 4) neighbours of 32 bits, `offset` bytes from an address."""
        names = ",".join(f"${i}" for i in range(count))
        names, width = (f"{{{names}}}", f".v{count}") if count > 1 else (names, "")
        return assemble(
            f"ld.shared{width}.b32 {names}, [${count}+{offset}];",
            [type_named("i32")] * count,
            "=r," * count + "r,~{memory}",
            address,
            ordered=True,
        )

    def load_shared_words_where(self, mask: Lanes, address: Lanes, count: int) -> list:
        """`count` (1, 2 or 4) neighbours of 32 bits at an address in shared memory where `mask`
        says so, elsewhere anything."""
        names = ",".join(f"${i}" for i in range(count))
        names, width = (f"{{{names}}}", f".v{count}") if count > 1 else (names, "")
        return assemble(
            f"@${count} ld.shared{width}.b32 {names}, [${count + 1}];",
            [type_named("i32")] * count,
            "=r," * count + "b,r,~{memory}",
            mask,
            address,
            ordered=True,
        )

    def load_shared_half(self, address: Lanes, offset: int) -> Lanes:
        """16 bits, above them zeros, `offset` bytes from an address in shared memory."""
        text = f"{{.reg .b16 x; ld.shared.b16 x, [$1+{offset}]; cvt.u32.u16 $0, x;}}"
        return assemble(text, type_named("i32"), "=r,r,~{memory}", address, ordered=True)

    def store_shared(self, address: Lanes, *numbers: Lanes) -> None:
        """1, 2 or 4 neighbouring numbers of 32 bits at a byte address in shared memory."""
        names = ",".join(f"${i + 1}" for i in range(len(numbers)))
        names = f"{{{names}}}" if len(numbers) > 1 else names
        width = f".v{len(numbers)}" if len(numbers) > 1 else ""
        kinds = ["f" if x.is_float else "r" for x in numbers]
        assemble(
            f"st.shared{width}.b32 [$0], {names};",
            None,
            ",".join(["r", *kinds, "~{memory}"]),
            address,
            *numbers,
            ordered=True,
        )

    def store_shared_half(self, address: Lanes, bits: Lanes) -> None:
        """The lower 16 bits at a byte address in shared memory."""
        text = "{.reg .b16 x; cvt.u16.u32 x, $1; st.shared.b16 [$0], x;}"
        assemble(text, None, "r,r,~{memory}", address, bits, ordered=True)

    def wait_for_lanes(self) -> None:
        """What any lane of the warp has stored before, all lanes load after."""
        assemble(f"bar.warp.sync {ALL_LANES};", None, "~{memory}", ordered=True)

    def wait_for_block(self) -> None:
        gpu.barrier()

    def wait_for_own_copies(self) -> None:
        """Ends all copies of the warp."""
        assemble("cp.async.wait_all;", None, "~{memory}", ordered=True)
        self.wait_for_lanes()

    def wait_for_copies(self) -> None:
        assemble("cp.async.wait_all;", None, "~{memory}", ordered=True)
        gpu.barrier()

    # --- matrices ------------------------------------------------------------------------------

    def load_matrices(self, address: Lanes, *, offset: int, count: int, transposed: bool) -> list:
        """`count` (2 or 4) matrices of 8 x 8 numbers of 16 bits, each as one register.

        Row i of matrix n is the 16 bytes at lane 8 n + i's `address` + `offset` in shared memory.
        """
        registers = ",".join(f"${i}" for i in range(count))
        trans = ".trans" if transposed else ""
        return assemble(
            f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, "
            f"[${count}+{offset}];",
            [type_named("i32")] * count,
            "=r," * count + "r,~{memory}",
            address,
            ordered=True,
        )

    def add_product(self, total: list, left: list, right: list, dtype) -> list:
        """total + left right of matrices 16 x 8, 16 x k and k x 8, where k is 8 times len(right).

        Of each 8 x 8 part of a matrix, lane 4 i + j has columns 2 j and 2 j + 1 of row i, or of the
        right matrix, rows 2 j and 2 j + 1 of column i; the left matrix' upper part comes first.
        """
        start, groups = 0, []
        for count in (4, len(left), len(right), 4):
            groups.append("{" + ",".join(f"${i}" for i in range(start, start + count)) + "}")
            start += count
        kind = _short(dtype)
        return assemble(
            f"mma.sync.aligned.m16n8k{8 * len(right)}.row.col.f32.{kind}.{kind}.f32 "
            f"{', '.join(groups)};",
            [type_named("f32")] * 4,
            ",".join(["=f"] * 4 + ["r"] * (len(left) + len(right)) + ["f"] * 4),
            *left,
            *right,
            *total,
        )

    def when(self, condition: Lanes, body: Callable, carry=()):
        """body(carry) if the condition holds, else carry.

        All lanes of the warp must agree, unless the body only loads, computes and stores.
        """
        leaves, tree = jax.tree.flatten(carry)
        branch = scf.IfOp(condition.value, [x.value.type for x in leaves], has_else=bool(leaves))
        with ir.InsertionPoint(branch.then_block):
            scf.yield_([x.value for x in jax.tree.leaves(body(carry))])
        if leaves:
            with ir.InsertionPoint(branch.else_block):
                scf.yield_([x.value for x in leaves])
        return jax.tree.unflatten(tree, [Lanes(x) for x in branch.results])

    def loop(self, count: int | Lanes, body: Callable, carry=()):
        """The last of carry = body(i, carry), a pytree of lanes, for each i below `count`.

        All lanes of the warp must agree on `count`.
        """
        leaves, tree = jax.tree.flatten(carry)
        first, step = (arith.constant(type_named("i32"), x) for x in (0, 1))
        end = count.value if isinstance(count, Lanes) else arith.constant(type_named("i32"), count)
        loop = scf.ForOp(first, end, step, [leaf.value for leaf in leaves])
        with ir.InsertionPoint(loop.body):
            now = jax.tree.unflatten(tree, [Lanes(x) for x in loop.inner_iter_args])
            after = jax.tree.leaves(body(Lanes(loop.induction_variable), now))
            scf.yield_([leaf.value for leaf in after])
        return jax.tree.unflatten(tree, [Lanes(x) for x in loop.results])


def _short(dtype) -> str:
    return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[jnp.dtype(dtype).name]


def _to_float32(value: ir.Value) -> Lanes:
    return Lanes(value if value.type == type_named("f32") else arith.extf(type_named("f32"), value))


def _element_and_pointer(ref: ir.Value, index: Lanes) -> tuple[ir.Type, ir.Value]:
    element = ir.MemRefType(ref.type).element_type
    pointer = mosaic.memref_ptr(ref)
    global_pointer = llvm.PointerType.get(GLOBAL_MEMORY)
    if pointer.type != global_pointer:
        pointer = llvm.addrspacecast(global_pointer, pointer)
    wide = arith.extsi(type_named("i64"), index.value)
    return element, mosaic.getelementptr(pointer, [wide], element)


def _where(mask: Lanes | None, body: Callable) -> None:
    if mask is None:
        body()
        return
    branch = scf.IfOp(mask.value)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])
