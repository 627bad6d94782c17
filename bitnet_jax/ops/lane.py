"""A lane of an NVIDIA GPU, in MLIR: the dozen instructions `mosaic.multiply` is written in."""

from typing import Any

from jax.experimental.mosaic import gpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def _binary(operation):
    return lambda self, a, b: operation(self.constant(a), self.constant(b))


class Lane:
    """Integers are i32, and a Python number may stand where one may.

    Built inside a kernel of four warps, from its arguments: ``x`` and ``out`` any arrays, ``codes``
    (layers, lines, outputs), of which ``index`` (1,) picks one, ``shared`` room for `add_warps`.
    """

    def __init__(self, x: Any, codes: Any, index: Any, out: Any, shared: Any):
        self._i32, self._i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        address = lambda ref, kind: llvm.ptrtoint(kind, utils.memref_ptr(ref))
        self.x, self.codes, self.out = (address(ref, self._i64) for ref in (x, codes, out))
        layers, lines, outputs = ir.MemRefType(codes.type).shape
        # As everywhere in XLA an index past the end means the last.
        (layer,) = self.load(address(index, self._i64), 0, 0, 0, 1)
        layer = arith.maxsi(self.min(layer, layers - 1), self.constant(0))
        self.codes = self._at(self.codes, layer, lines * outputs, 0)
        self._shared = address(shared, self._i32)
        thread = gpu.thread_idx()
        self.lane, self.warp = self.and_(thread, 31), self.shift(thread, 5)

    def constant(self, value: Any) -> Any:
        return arith.constant(self._i32, value) if isinstance(value, int) else value

    add, mul, and_ = _binary(arith.addi), _binary(arith.muli), _binary(arith.andi)
    min, div, rem = _binary(arith.minsi), _binary(arith.divui), _binary(arith.remui)
    shift, shift_signed = _binary(arith.shrui), _binary(arith.shrsi)

    def less(self, a: Any, b: Any) -> Any:
        return arith.cmpi(arith.CmpIPredicate.slt, self.constant(a), self.constant(b))

    def loop(self, turns: int, carry: Any, body: Any) -> Any:
        """carry after ``turns`` times carry = body(i, carry)."""
        if not turns:
            return carry
        return gpu.fori(self.constant(turns), carry)(body).results

    def prmt(self, a: Any, b: Any, pick: int) -> Any:
        """Four of the eight bytes of a (0 to 3) and b (4 to 7), by the digits of pick."""
        return self._ptx("prmt.b32 $0, $1, $2, $3;", 1, "rrr", a, b, pick)[0]

    def mma(self, c: list, a: list, b: list) -> list:
        """c (16, 8) + a (16, 32) @ b (32, 8), int8, spread over a warp as PTX has it."""
        code = (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        return self._ptx(code, 4, "r" * 10, *a, *b, *c)

    def load(self, array: Any, line: Any, stride: int, offset: Any, words: int) -> list:
        """``words`` words from the byte ``line`` x ``stride`` + ``offset`` of an array."""
        names = ", ".join(f"${i}" for i in range(words))
        many = f".v{words}.b32 {{{names}}}" if words > 1 else ".b32 $0"
        at = self._at(array, line, stride, offset)
        return self._ptx(f"ld.global.nc{many}, [${words}];", words, "l", at)

    def store(self, array: Any, line: Any, stride: int, offset: Any, values: list, where: Any):
        """``values`` from that byte on, in lanes ``where`` it is true."""
        names = ", ".join(f"${i + 1}" for i in range(len(values)))
        many = f".v{len(values)}.b32 [$0], {{{names}}}" if len(values) > 1 else ".b32 [$0], $1"
        with gpu.when(where):
            at = self._at(array, line, stride, offset)
            self._ptx(f"st.global{many};", 0, "l" + "r" * len(values), at, *values)

    def add_warps(self, lists: list[list]) -> list[list]:
        """Of each list's sums over the four warps, warp w the w-th fourth."""
        place = lambda i, warp: self.add(
            self._shared,
            self.mul(self.add(self.mul(self.add(self.mul(i, 4), warp), 32), self.lane), 4),
        )
        flat = [v for values in lists for v in values]
        for i, value in enumerate(flat):
            self._ptx("st.shared.b32 [$0], $1;", 0, "rr", place(i, self.warp), value)
        gpu.warpgroup_barrier()
        found, size = [], len(lists[0])
        for start in range(0, len(flat), size):
            mine = self.add(self.mul(self.warp, size // 4), start)
            found.append([self._sum(place, self.add(mine, i)) for i in range(size // 4)])
        return found

    def _sum(self, place: Any, i: Any) -> Any:
        total = self.constant(0)
        for warp in range(4):
            # Not free to move: it must stay behind the barrier.
            read = self._ptx("ld.shared.b32 $0, [$1];", 1, "r", place(i, warp), moves=False)
            total = self.add(total, read[0])
        return total

    def _at(self, array: Any, line: Any, stride: int, offset: Any) -> Any:
        """The address, in 64 bits: a stack of layers may be larger than 2 GB."""
        wide = lambda value: arith.extsi(self._i64, self.constant(value))
        far = arith.muli(wide(line), arith.constant(self._i64, stride))
        return arith.addi(array, arith.addi(far, wide(offset)))

    def _ptx(self, code: str, results: int, kinds: str, *operands: Any, moves: bool = True) -> list:
        """Inline PTX: $0, $1, ... are its i32 results, then its operands, of ``kinds`` r or l."""
        kind = {0: ir.Type.parse("!llvm.void"), 1: self._i32}.get(results)
        kind = kind or llvm.StructType.get_literal([self._i32] * results)
        value: Any = llvm.inline_asm(
            kind,
            [self.constant(v) for v in operands],
            code,
            ",".join(["=r"] * results + list(kinds)),
            has_side_effects=not (moves and results),
        )
        if results < 2:
            return [value] * results
        return [llvm.extractvalue(self._i32, value, [i]) for i in range(results)]
