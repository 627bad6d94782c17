"""A few rows from packed codes on NVIDIA GPUs: int8 tensor cores fed with the bytes as they lie.

Written for Pallas's Mosaic GPU backend, which needs no compiler of the user's. Mosaic's own matrix
product wants inputs adjacent in memory and our bytes have outputs adjacent, so each lane reads a
square of them, turns it in registers and multiplies with `mma.sync`, the instruction that takes
its operands from registers:

- A warp takes 32 rows of bytes and 8 `width` outputs at a time. They are copied to shared memory
  several steps ahead. A lane reads `width` bytes of each of eight rows, where a byte of a word is
  an output, and eight `prmt` turn four words so that a byte is an input.
- Plane p of those words, 2 bits of each byte, is the codes of inputs 4 i + p. AND picks a plane;
  planes 1 and 3 stay where they are, four times too large, and their sums are divided once, in the
  end. The activations, few, are put in planes by XLA.
- Codes lie one too large, so the sum of a row's activations is subtracted.
- The four warps of a block take different rows and add up in shared memory; the blocks of a split
  of the inputs write their sums apart, and XLA adds these to whatever comes after.

The arithmetic is written against a machine of a dozen instructions, `lane.Lane` on the GPU, and numpy
in tests/test_mosaic.py, where every lane is computed without one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import xla

_ROWS = 32  # rows of bytes that meet in one mma: its inputs, of each plane
_WARPS = 4
_TOKENS = 8  # rows of activations in one mma
# Enough blocks to keep all multiprocessors (132 on Hopper) reading. More splits, more partial sums.
_BLOCKS = 528
_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is cut. All static; `plan` makes it.

    Attributes:
      tokens: rows of activations.
      lines: rows of bytes, a quarter of the inputs.
      outputs: columns of bytes.
      width: outputs of a lane, each a byte: 4, 8 or 16.
      tiles: groups of eight tokens that one block multiplies.
      splits: parts the inputs are cut into, each with sums of its own.
      steps: times a warp takes 32 rows.
      ahead: steps whose bytes are on their way at once.
    """

    tokens: int
    lines: int
    outputs: int
    width: int
    tiles: int
    splits: int
    steps: int
    ahead: int

    @property
    def columns(self) -> int:
        """Blocks side by side over the outputs."""
        return -(-self.outputs // (8 * self.width))

    @property
    def heights(self) -> int:
        """Blocks over the tokens. They read the same bytes, the later ones from the cache."""
        return -(-self.tokens // (_TOKENS * self.tiles))

    @property
    def blocks(self) -> int:
        return self.columns * self.heights * self.splits

    @property
    def padded_lines(self) -> int:
        return _ROWS * _WARPS * self.steps * self.splits

    @property
    def shared(self) -> int:
        """Words of shared memory: what is on its way, and later the sums of the warps."""
        coming = min(self.ahead, self.steps) * 2 * self.width
        return 32 * _WARPS * max(coming, 2 * self.tiles * self.width)


def plan(
    tokens: int,
    lines: int,
    outputs: int,
    *,
    blocks: int = _BLOCKS,
    ahead: int = _AHEAD,
    widest: int = 16,
) -> Plan | None:
    """How to cut a product, or None for one the op does not take.

    Args:
      tokens, lines, outputs: as in `Plan`.
      blocks: at least so many, where the product is large enough.
      ahead, widest: bounds of `Plan.ahead` and `Plan.width`.

    >>> plan(1, 1024, 4096)
    Plan(tokens=1, lines=1024, outputs=4096, width=16, tiles=1, splits=8, steps=1, ahead=4)
    """
    if outputs % 16 or not (tokens and lines and outputs):
        return None
    # Twice the tokens, half the width: as many accumulators, which is what registers are full of.
    tiles = 1 if tokens <= _TOKENS else 2
    width = min(16 // tiles, widest)
    cut = Plan(tokens, lines, outputs, width, tiles, 1, 1, ahead)
    chunks = -(-lines // (_ROWS * _WARPS))
    splits = min(max(-(-blocks // (cut.columns * cut.heights)), 1), chunks)
    steps = -(-chunks // splits)
    return dataclasses.replace(cut, splits=-(-chunks // steps), steps=steps)


def planes(x: jax.Array, p: Plan) -> jax.Array:
    """int8 (tokens, k) -> int32 words (padded lines / 32, tokens, 4, 8), as lanes load them.

    Word (q, plane p, half h) of 32 rows of bytes holds the inputs 4 r + p of its rows r =
    16 h + 4 q ... 16 h + 4 q + 3.
    """
    x = jnp.pad(x, ((0, 0), (0, 4 * p.padded_lines - x.shape[1])))
    x = x.reshape(p.tokens, -1, 2, 4, 4, 4)  # tokens, chunk, h, q, row, plane
    x = x.transpose(1, 0, 3, 5, 2, 4)
    return lax.bitcast_convert_type(x, jnp.int32).reshape(-1, p.tokens, 4, 8)


def turned(m: Any, words: list) -> list:
    """Four words, byte j of word i -> byte i of word j."""
    a, b, c, d = words
    low, high = 0x5140, 0x7362
    ab, cd, ef, gh = m.prmt(a, b, low), m.prmt(c, d, low), m.prmt(a, b, high), m.prmt(c, d, high)
    return [m.prmt(*pair, pick) for pair in ((ab, cd), (ef, gh)) for pick in (0x5410, 0x7632)]


def multiply(m: Any, p: Plan, block: Any) -> None:
    """What one lane of a block does: m is the machine, with its operands ``x``, ``codes``, ``out``.

    Adds up 8 `width` outputs of 8 `tiles` tokens over the rows of bytes of its split.
    """
    group, quad = m.shift(m.lane, 2), m.and_(m.lane, 3)  # the lane's output and its four inputs
    column, block = m.rem(block, p.columns), m.div(block, p.columns)
    height, split = m.rem(block, p.heights), m.div(block, p.heights)
    left = m.mul(column, 8 * p.width)
    # Pieces past the end are the last one again, so that everybody may read and write.
    piece = lambda i: m.min(m.add(left, m.mul(i, 16)), p.outputs - 16)
    of_piece = 16 // p.width  # lanes that share one
    output = m.add(piece(m.div(group, of_piece)), m.mul(m.rem(group, of_piece), p.width))
    token = [
        m.min(m.add(m.mul(height, _TOKENS * p.tiles), m.add(group, _TOKENS * t)), p.tokens - 1)
        for t in range(p.tiles)
    ]
    start = m.add(m.mul(split, _WARPS * p.steps), m.warp)

    def place(slot, row, piece):
        """Where a row's piece of 16 bytes lies, of the warp's own shared memory.

        Row 16 h + 4 q + i is the (16 h + 4 i + q)th, and its pieces are exchanged by q: lanes that
        read at once, of all q and neighbouring outputs, then meet all banks.
        """
        q = m.and_(m.shift(row, 2), 3)
        line = m.add(m.and_(row, 16), m.add(m.mul(m.and_(row, 3), 4), q))
        by = {16: m.mul(q, 2), 8: m.and_(q, 2), 4: 0}[p.width]
        at = m.add(m.mul(line, 8 * p.width), m.mul(m.xor(piece, by), 16))
        return m.add(m.mul(slot, _ROWS * 8 * p.width), at)

    def fetch(step, slot):
        """32 rows on their way, neighbouring lanes neighbouring pieces."""
        chunk = m.mul(m.add(start, m.mul(step, _WARPS)), _ROWS)
        pieces = p.width // 2  # of a row
        for i in range(0, _ROWS, 32 // pieces):
            row, mine = m.add(m.div(m.lane, pieces), i), m.rem(m.lane, pieces)
            line = m.min(m.add(chunk, row), p.lines - 1)
            m.fetch(place(slot, row, mine), m.codes, line, p.outputs, piece(mine))

    def load(step):
        """The activations that meet them: words (plane, half of the rows) of each tile."""
        chunk = m.add(start, m.mul(step, _WARPS))
        at = [m.add(m.mul(m.add(m.mul(chunk, p.tokens), t), 4), quad) for t in token]
        return [m.load(m.x, i, 32, 0, 4) + m.load(m.x, i, 32, 16, 4) for i in at]

    def read(slot, half, i):
        row = m.add(m.mul(quad, 4), 16 * half + i)
        within = m.mul(m.rem(group, of_piece), p.width)
        return m.fetched(m.add(place(slot, row, m.div(group, of_piece)), within), p.width // 4)

    def step(sums, slot, x):
        codes = [[read(slot, half, i) for i in range(4)] for half in range(2)]
        for word in range(p.width // 4):
            turns = [turned(m, [row[word] for row in half]) for half in codes]
            for two in range(2):  # a matrix of 16 outputs: two of each lane
                a = [v for half in turns for v in half[2 * two : 2 * two + 2]]
                _planes(m, sums, 2 * (2 * word + two) * p.tiles, a, x)
        return sums

    ahead = min(p.ahead, p.steps)
    for i in range(ahead):
        fetch(i, i)
        m.commit()

    def turn(i, sums):
        slot, x = m.rem(i, ahead), load(i)
        m.wait(ahead - 1)
        m.meet()  # what the other lanes fetched is there
        sums = step(sums, slot, x)
        if p.steps > ahead:
            m.meet()  # the other lanes have read
            m.when(m.less(m.add(i, ahead), p.steps), lambda: fetch(m.add(i, ahead), slot))
        m.commit()  # of nothing at last, so that the groups to wait for stay as many
        return sums

    zero = [m.constant(0)] * 4
    sums = m.loop(p.steps, [list(zero) for _ in range(p.width * p.tiles)], turn)
    whole = [
        [m.add(one, m.shift_signed(four, 2)) for one, four in zip(ones, fours)]
        for ones, fours in zip(sums[::2], sums[1::2])
    ]
    _write(m, p, whole, output, height, split, quad)


def _planes(m: Any, sums: list, first: int, a: list, x: list) -> None:
    """The four planes of a (16 outputs, 32 rows) times each tile of x, to sums from ``first`` on:
    of each tile those of planes 0 and 2, and those of 1 and 3, four times too large."""
    moved = [m.shift(v, 4) for v in a]
    for plane in range(4):
        mask = (0x03030303, 0x0C0C0C0C)[plane % 2]
        part = [m.and_(v, mask) for v in (moved if plane > 1 else a)]
        for t, words in enumerate(x):
            at = first + 2 * t + plane % 2
            sums[at] = m.mma(sums[at], part, words[2 * plane : 2 * plane + 2])


def _write(m: Any, p: Plan, whole: list, output: Any, height: Any, split: Any, quad: Any) -> None:
    """Sums of the four warps together, to out (splits, tokens, outputs).

    Register r of matrix i is output 2 i + r // 2 of the lane's and token 2 quad + r % 2. Of the
    sum of all warps each writes a fourth of the lane's outputs.
    """
    cells = [(t, j) for t in range(p.tiles) for j in range(2)]
    sums = m.add_warps([[v for matrix in whole[t :: p.tiles] for v in matrix[j::2]]
                        for t, j in cells])  # fmt: skip
    at = m.mul(m.add(output, m.mul(m.warp, p.width // _WARPS)), 4)
    for (t, j), added in zip(cells, sums):
        token = m.add(m.mul(height, _TOKENS * p.tiles), m.add(m.mul(quad, 2), 8 * t + j))
        line = m.add(m.mul(split, p.tokens), token)
        m.store(m.out, line, 4 * p.outputs, at, added, m.less(token, p.tokens))


@functools.cache
def available() -> bool:
    """Whether kernels are picked here: one GPU, of compute capability 9.0 (Hopper) or later.

    With several XLA cuts a program between them, which it cannot do with a kernel: it would gather
    the operands. Inside `jax.shard_map`, where the user has cut, ask for ``op="mosaic"``.
    """
    devices = jax.devices()
    if len(devices) != 1 or devices[0].platform != "gpu":
        return False
    try:
        return float(devices[0].compute_capability) >= 9
    except (AttributeError, ValueError):  # another maker's GPU, whose name is no number
        return False


@functools.cache
def _kernel(p: Plan):
    """int32 words of x, codes (layers, lines, outputs), index (1,) -> (splits, tokens, outputs)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from .lane import Lane

    def packed_ternary(x, codes, index, out, shared):
        refs = (plgpu.RefType(),) * 5

        @plgpu.inline_mgpu(arg_types=(*refs, plgpu.Layout.WG_SPLAT(())))
        def body(_, x, codes, index, out, shared, block):
            multiply(Lane(p, x, codes, index, out, shared), p, block.registers.item())

        body(x, codes, index, out, shared, lax.axis_index("block"))

    return plgpu.kernel(
        packed_ternary,
        out_type=jax.ShapeDtypeStruct((p.splits, p.tokens, p.outputs), jnp.int32),
        scratch_types=[plgpu.SMEM((p.shared,), jnp.int32)],
        grid=(p.blocks,),
        grid_names=("block",),
        # A lane is what this is written for; 0.10 has it as its default, 0.11 has not.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def _product(x: jax.Array, codes: jax.Array, index: jax.Array, **cut: int) -> jax.Array:
    """x int8 (m, k), codes uint8 (layers, lines, n), index () -> int32 (m, n)."""
    p = plan(x.shape[0], *codes.shape[1:], **cut)
    if p is None:
        return xla.packed_product(x, codes, x.shape[1], index)
    parts = _kernel(p)(planes(x, p), codes, index.astype(jnp.int32)[None])
    return parts.sum(0) - x.sum(1, keepdims=True, dtype=jnp.int32)


def packed_product(
    x: jax.Array,
    codes: jax.Array,
    in_features: int,
    index: jax.Array | None = None,
    **cut: int,
) -> jax.Array:
    """int8 activations times packed ternary codes, on an NVIDIA GPU; see `xla.packed_product`.

    out[b, m, n] = sum over k of x[b, m, k] * code[b, k, n]

    Args:
      x: int8 (*batch, rows, k). Bytes are read again for every 16 rows: for many, unpack.
      codes: uint8 (*batch, ceil(k / 4), n), as `bitnet_jax.packed.pack_codes` makes them; with an
        index (*batch, layers, ceil(k / 4), n). A product `plan` does not take, with n no multiple
        of 16, is unpacked and multiplied by XLA.
      in_features: k.
      index: int32 (*batch), which layer of codes to multiply by; nothing is copied for it.
      **cut: ``blocks``, ``ahead`` or ``widest`` of `plan`, to measure others than its own.

    Returns:
      int32 (*batch, rows, n). Batch axes broadcast.
    """
    if x.shape[-1] != in_features or codes.shape[-2] != -(-in_features // 4):
        raise ValueError(f"x {x.shape} and codes {codes.shape} do not fit {in_features} features")
    if index is None:
        codes, index = jnp.expand_dims(codes, -3), jnp.zeros((), jnp.int32)
    product = functools.partial(_product, **cut)
    return jnp.vectorize(product, signature="(m,k),(l,p,n),()->(m,n)")(x, codes, index)
