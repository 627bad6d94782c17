"""Codes as onnxruntime's MatMulNBits holds them: blocks of inputs, low bits first."""

import dataclasses

import numpy as np

from ...errors import BitnetError


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the inputs of a matrix are cut.

    Attributes:
      inputs: of the matrix.
      bits: of a code, 2, 4 or 8.
      size: codes in a block, a power of 2 from 16 to 256.
      held: inputs in a block; the codes behind them are 0.
    """

    inputs: int
    bits: int
    size: int
    held: int

    @property
    def count(self) -> int:
        """Blocks a row."""
        return -(-self.inputs // self.held)


def exact_blocks(inputs: int, bits: int) -> Blocks:
    """Blocks with one place free in each.

    onnxruntime's fast products round the activations of each block to int8 by the largest of them.
    Ours are int8 codes already: with a 127 in the free place the largest is 127, the factor 1, and
    the sums are exact integers. Blocks of 32, 64 and 128 have fast products at every bits; of the
    largest, the fastest, where they add no more than an eighth, else of those that add least.

    >>> exact_blocks(576, 2), exact_blocks(90, 2).size
    (Blocks(inputs=576, bits=2, size=128, held=127), 32)
    """
    sizes = [Blocks(inputs, bits, size, size - 1) for size in (128, 64, 32)]
    codes = lambda blocks: blocks.count * blocks.size
    return sizes[0] if 8 * codes(sizes[0]) <= 9 * inputs else min(sizes, key=codes)


def group_blocks(inputs: int, bits: int, group: int, path: str) -> Blocks:
    """Full blocks that divide the groups whose inputs share a scale.

    Raises:
      BitnetError: if no block divides them.

    >>> group_blocks(192, 2, 96, "kernel").size
    32
    """
    size = min(group & -group, 256)  # the largest power of 2 that divides it
    if size < 16:
        raise BitnetError(
            f"{path}: groups of {group} inputs cannot be cut into MatMulNBits' blocks of 16 or "
            "more; export it with form='int8' or convert it with groups that are a multiple of 16"
        )
    return Blocks(inputs, bits, size, size)


def pack_blocks(codes: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Codes (in, out) to bytes uint8 (out, blocks, size * bits / 8).

    byte = sum over j < n of (code[j] + 2 ** (bits - 1)) << bits j, with n = 8 / bits codes a byte.

    >>> pack_blocks(np.array([[-1], [0], [1]], np.int8), Blocks(3, 2, 16, 15)).ravel().tolist()
    [185, 170, 170, 170]
    """
    *_, out = codes.shape
    rows = np.zeros((out, blocks.count * blocks.held), np.int8)
    rows[:, : blocks.inputs] = codes.T
    rows = rows.reshape(out, blocks.count, blocks.held)
    rows = np.pad(rows, [(0, 0), (0, 0), (0, blocks.size - blocks.held)])
    # Wraps for 8 bits, as it should: -127 + 128 mod 256.
    shifted = rows.astype(np.uint8) + np.uint8(2 ** (blocks.bits - 1))
    parts = shifted.reshape(out, blocks.count, -1, 8 // blocks.bits)
    packed = np.zeros(parts.shape[:-1], np.uint8)
    for j in range(parts.shape[-1]):
        packed |= parts[..., j] << np.uint8(j * blocks.bits)
    return packed


def unpack_blocks(packed: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Inverse of `pack_blocks`: bytes to codes (in, out) int8.

    >>> blocks = Blocks(3, 2, 16, 15)
    >>> unpack_blocks(pack_blocks(np.array([[-1], [0], [1]], np.int8), blocks), blocks).T.tolist()
    [[-1, 0, 1]]
    """
    shifts = np.arange(0, 8, blocks.bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8(2**blocks.bits - 1)
    codes = (parts - np.uint8(2 ** (blocks.bits - 1))).astype(np.int8)
    held = codes.reshape(len(packed), blocks.count, blocks.size)[..., : blocks.held]
    return np.ascontiguousarray(held.reshape(len(packed), -1)[:, : blocks.inputs].T)
