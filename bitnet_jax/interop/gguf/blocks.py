"""Codes and scales to GGUF's blocks and back, without ever going through float weights.

| type  | weights | bytes | codes   | of a block, in this order                                |
|-------|---------|-------|---------|----------------------------------------------------------|
| TQ1_0 | 256     | 54    | -1..1   | 5 in a byte: 48 bytes, 4 bytes of 4, scale               |
| TQ2_0 | 256     | 66    | -1..1   | 2 bits each: 64 bytes, scale                             |
| Q2_0  | 64      | 18    | -1..2   | scale, 2 bits each: 16 bytes                             |
| Q4_0  | 32      | 18    | -8..7   | scale, 4 bits each: 16 bytes                             |
| Q8_0  | 32      | 34    | -128..127 | scale, a byte each                                     |

The scale is a float16 (ggml-common.h and ggml-quants.c of llama.cpp say the rest).
"""

from collections.abc import Callable

import numpy as np

from .container import TYPE_IDS, TYPES

# Digits of five codes in a byte, the first the most significant.
_POWERS = np.array([81, 27, 9, 3, 1], np.uint16)
# Where the codes of a TQ1_0 block lie: (first, codes in a byte, bytes).
_TQ1_PARTS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))


def size(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block.

    >>> size("TQ2_0")
    (256, 66)
    """
    return TYPES[TYPE_IDS[kind]][1:]


def encode(codes: np.ndarray, scale: np.ndarray, kind: str) -> np.ndarray:
    """Codes and the scale of each block to a tensor's bytes.

    Args:
      codes: integers (rows, features) in the type's range; features a multiple of its block.
      scale: (rows, features / block), exact in float16.
      kind: a type of the table above.

    Returns:
      uint8 (rows, bytes of a row). A block of zeros keeps its scale, where llama.cpp's quantiser,
      which only sees values, writes 0; all other bytes are its own.

    >>> encode(np.ones((1, 256), np.int8), np.full((1, 1), 0.5), "TQ2_0")[0, [0, -2, -1]].tolist()
    [170, 0, 56]
    """
    rows, features = codes.shape
    block, _ = size(kind)
    half = np.ascontiguousarray(scale, "<f2").view(np.uint8).reshape(rows, features // block, 2)
    body = _ENCODE[kind](codes.reshape(rows, features // block, block))
    parts = (body, half) if kind.startswith("TQ") else (half, body)
    return np.concatenate(parts, -1).reshape(rows, -1)


def decode(data: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A tensor's bytes to its codes int8 (rows, features) and float32 scales (rows, blocks).

    Inverse of `encode`.
    """
    rows, (_, width) = data.shape[0], size(kind)
    blocks = data.reshape(rows, -1, width)
    body, half = (blocks[..., :-2], blocks[..., -2:])
    if not kind.startswith("TQ"):
        half, body = blocks[..., :2], blocks[..., 2:]
    scale = np.ascontiguousarray(half).view("<f2")[..., 0].astype(np.float32)
    return _DECODE[kind](body).reshape(rows, -1), scale


def _tq1(codes: np.ndarray) -> np.ndarray:
    parts = []
    for first, count, width in _TQ1_PARTS:
        digits = codes[..., first : first + count * width].astype(np.int16) + 1
        digits = digits.reshape(*codes.shape[:-1], count, width).astype(np.uint16)
        value = (digits * _POWERS[:count, None]).sum(-2, dtype=np.uint16)
        # Fixed point, rounded up: digit n is then the top of the n-th product by 3.
        parts.append(((value.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate(parts, -1)


def _from_tq1(body: np.ndarray) -> np.ndarray:
    parts, at = [], 0
    for _, count, width in _TQ1_PARTS:
        value = body[..., None, at : at + width]
        digits = value * (3 ** np.arange(count, dtype=np.uint8))[:, None]  # modulo 256
        codes = (digits.astype(np.uint16) * 3 >> 8).astype(np.int8) - np.int8(1)
        parts.append(codes.reshape(*body.shape[:-1], -1))
        at += width
    return np.concatenate(parts, -1)


def _planes(bits: int, run: int, offset: int) -> tuple[Callable, Callable]:
    """Codes in planes: element n * run + m of each 8 / bits runs lies in bits n of byte m."""
    count = 8 // bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]

    def pack(codes: np.ndarray) -> np.ndarray:
        shifted = (codes.astype(np.int16) + offset).astype(np.uint8)
        parts = shifted.reshape(*codes.shape[:-1], -1, count, run) << shifts
        return np.bitwise_or.reduce(parts, -2).reshape(*codes.shape[:-1], -1)

    def unpack(body: np.ndarray) -> np.ndarray:
        parts = body.reshape(*body.shape[:-1], -1, 1, run) >> shifts & np.uint8(2**bits - 1)
        return (parts.astype(np.int8) - np.int8(offset)).reshape(*body.shape[:-1], -1)

    return pack, unpack


_PAIRS: dict[str, tuple[Callable, Callable]] = {
    "TQ1_0": (_tq1, _from_tq1),
    "TQ2_0": _planes(2, 32, 1),
    "Q2_0": _planes(2, 1, 1),
    "Q4_0": _planes(4, 16, 8),
    "Q8_0": (lambda codes: codes.astype(np.int8).view(np.uint8), lambda body: body.view(np.int8)),
}
_ENCODE = {kind: pair[0] for kind, pair in _PAIRS.items()}
_DECODE = {kind: pair[1] for kind, pair in _PAIRS.items()}
# The codes each type holds, smallest type first: where a matrix is looked for its own.
RANGES = {"TQ1_0": (-1, 1), "TQ2_0": (-1, 1), "Q2_0": (-1, 2), "Q4_0": (-8, 7), "Q8_0": (-128, 127)}
