"""A few rows from packed codes on NVIDIA GPUs: int8 tensor cores fed with the bytes as they lie.

Written for Pallas's Mosaic GPU backend, which needs no compiler of the user's. Mosaic's own matrix
product wants inputs adjacent in memory and our bytes have outputs adjacent, so each lane loads a
square of them, turns it in registers and multiplies with `mma.sync`, the instruction that takes
its operands from registers:

- A warp takes 32 rows of bytes and 8 `width` outputs at a time. A lane loads `width` bytes of each
  of eight rows, and a byte of a word is an output; eight `prmt` turn four words so that a byte is
  an input, as the instruction wants it.
- Plane p of those words, 2 bits of each byte, is the codes of inputs 4 i + p. AND picks a plane;
  planes 1 and 3 stay where they are, four times too large, and their sums are divided once, in the
  end. The activations, few, are put in planes by XLA.
- Codes lie one too large, so the sum of a row's activations is subtracted.
- The four warps of a block take different rows and add up in shared memory; the blocks of a split
  of the inputs write their sums apart, and XLA adds these to whatever comes after.

The arithmetic is written against a machine of a dozen instructions: `lane.Lane` on the GPU, numpy
in tests/test_mosaic.py, where every lane is computed without one. Copies to shared memory, several
steps ahead, were tried and are no faster (20.5 us beside 19.4, benchmarks/results/gpu.txt).
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
# Two blocks for each of 132 multiprocessors, which is what fits the registers. Measured on an H200
# against two and four times as many (benchmarks/results/gpu.txt).
_BLOCKS = 264


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is cut. All static; `plan` makes it.

    Attributes:
      tokens: rows of activations.
      lines: rows of bytes, a quarter of the inputs.
      outputs: columns of bytes.
      width: outputs a lane loads at once, in bytes: 4, 8 or 16. They divide the outputs.
      tiles: groups of eight tokens that one block multiplies.
      splits: parts the inputs are cut into, each with sums of its own.
      steps: times a warp takes 32 rows.
    """

    tokens: int
    lines: int
    outputs: int
    width: int
    tiles: int
    splits: int
    steps: int

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


def plan(tokens: int, lines: int, outputs: int, blocks: int = _BLOCKS) -> Plan | None:
    """How to cut a product, or None for one the op does not take.

    >>> plan(1, 1024, 4096)
    Plan(tokens=1, lines=1024, outputs=4096, width=16, tiles=1, splits=8, steps=1)
    """
    widths = [w for w in (16, 8, 4) if outputs % w == 0]
    if not widths or not tokens or not lines or not outputs:
        return None
    # Twice the tokens, half the width: as many accumulators, which is what registers are full of.
    tiles = 1 if tokens <= _TOKENS else 2
    width = next((w for w in widths if w * tiles <= 16), widths[-1])
    cut = Plan(tokens, lines, outputs, width, tiles, 1, 1)
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
    words = p.width // 4
    group, quad = m.shift(m.lane, 2), m.and_(m.lane, 3)  # the lane's output and its four inputs
    column, block = m.rem(block, p.columns), m.div(block, p.columns)
    height, split = m.rem(block, p.heights), m.div(block, p.heights)
    # Lanes past the end do again what the last ones do, so that all of them may read and write.
    first = m.mul(m.add(m.mul(column, 8), group), p.width)
    output = m.min(first, p.outputs - p.width)
    token = [
        m.min(m.add(m.mul(height, _TOKENS * p.tiles), m.add(group, _TOKENS * t)), p.tokens - 1)
        for t in range(p.tiles)
    ]
    start = m.add(m.mul(split, _WARPS * p.steps), m.warp)

    def load(step):
        chunk = m.add(start, m.mul(step, _WARPS))
        line = m.add(m.mul(chunk, _ROWS), m.mul(quad, 4))
        rows = [m.min(m.add(line, i), p.lines - 1) for i in (0, 1, 2, 3, 16, 17, 18, 19)]
        codes = [m.load(m.codes, row, p.outputs, output, words) for row in rows]
        at = [m.add(m.mul(m.add(m.mul(chunk, p.tokens), t), 4), quad) for t in token]
        x = [m.load(m.x, i, 32, 16 * half, 4) for i in at for half in range(2)]
        return codes, x

    def step(sums, loaded):
        codes, x = loaded
        turns = [[turned(m, [row[i] for row in codes[h : h + 4]]) for h in (0, 4)]
                 for i in range(words)]  # fmt: skip
        for i in range(2 * words):  # a matrix of 16 outputs: two of each lane
            near, far = (half[2 * (i % 2) :][:2] for half in turns[i // 2])
            a = [*near, *far]
            moved = [m.shift(v, 4) for v in a]
            for plane, (source, mask) in enumerate(
                ((a, 0x03030303), (a, 0x0C0C0C0C), (moved, 0x03030303), (moved, 0x0C0C0C0C))
            ):
                part = [m.and_(v, mask) for v in source]
                for t in range(p.tiles):
                    b = x[2 * t + plane // 2][2 * (plane % 2) :][:2]
                    at = (i * p.tiles + t) * 2 + plane % 2
                    sums[at] = m.mma(sums[at], part, b)
        return sums

    zero = [m.constant(0)] * 4
    sums = [list(zero) for _ in range(2 * words * p.tiles * 2)]
    loaded = load(m.constant(0))

    def turn(i, carry):
        sums, loaded = carry
        following = load(m.add(i, 1))  # on its way while the last is multiplied
        return step(sums, loaded), following

    sums, loaded = m.loop(p.steps - 1, (sums, loaded), turn)
    sums = step(sums, loaded)
    whole = [
        [m.add(one, m.shift_signed(four, 2)) for one, four in zip(ones, fours)]
        for ones, fours in zip(sums[::2], sums[1::2])
    ]
    _write(m, p, whole, output, height, split, quad)


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
def _kernel(p: Plan) -> Any:
    """int32 words of x, codes (layers, lines, outputs), index (1,) -> (splits, tokens, outputs)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from .lane import Lane

    def packed_ternary(x, codes, index, out, shared):
        refs = (plgpu.RefType(),) * 5

        inline: Any = plgpu.inline_mgpu(arg_types=(*refs, plgpu.Layout.WG_SPLAT(())))

        @inline
        def body(_, x, codes, index, out, shared, block):
            multiply(Lane(x, codes, index, out, shared), p, block.registers.item())

        body(x, codes, index, out, shared, lax.axis_index("block"))

    return plgpu.kernel(
        packed_ternary,
        out_type=jax.ShapeDtypeStruct((p.splits, p.tokens, p.outputs), jnp.int32),
        scratch_types=[plgpu.SMEM((2 * p.tiles * p.width * _WARPS * 32,), jnp.int32)],
        grid=(p.blocks,),
        grid_names=("block",),
        # A lane is what this is written for; 0.10 has it as its default, 0.11 has not.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def _product(x: jax.Array, codes: jax.Array, index: jax.Array, blocks: int) -> jax.Array:
    """x int8 (m, k), codes uint8 (layers, lines, n), index () -> int32 (m, n)."""
    _, lines, outputs = codes.shape
    p = plan(x.shape[0], lines, outputs, blocks)
    if p is None:
        return xla.packed_product(x, codes, x.shape[1], index)
    parts = _kernel(p)(planes(x, p), codes, index.astype(jnp.int32)[None])
    return parts.sum(0) - x.sum(1, keepdims=True, dtype=jnp.int32)


def packed_product(
    x: jax.Array,
    codes: jax.Array,
    in_features: int,
    index: jax.Array | None = None,
    *,
    blocks: int = _BLOCKS,
) -> jax.Array:
    """int8 activations times packed ternary codes, on an NVIDIA GPU; see `xla.packed_product`.

    out[b, m, n] = sum over k of x[b, m, k] * code[b, k, n]

    Args:
      x: int8 (*batch, rows, k). Bytes are read again for every 16 rows: for many, unpack.
      codes: uint8 (*batch, ceil(k / 4), n), as `bitnet_jax.packed.pack_codes` makes them; with an
        index (*batch, layers, ceil(k / 4), n). A product `plan` does not take, with n no multiple
        of 4, is unpacked and multiplied by XLA.
      in_features: k.
      index: int32 (*batch), which layer of codes to multiply by; nothing is copied for it.
      blocks: how many to cut the product into, at least and if it is large enough.

    Returns:
      int32 (*batch, rows, n). Batch axes broadcast.
    """
    if x.shape[-1] != in_features or codes.shape[-2] != -(-in_features // 4):
        raise ValueError(f"x {x.shape} and codes {codes.shape} do not fit {in_features} features")
    if index is None:
        codes, index = jnp.expand_dims(codes, -3), jnp.zeros((), jnp.int32)
    product = functools.partial(_product, blocks=blocks)
    return jnp.vectorize(product, signature="(m,k),(l,p,n),()->(m,n)")(x, codes, index)
