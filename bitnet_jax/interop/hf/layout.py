"""Packed codes of Hugging Face's to ours and back by moving bits; codes read out of values."""

import numpy as np

from ...errors import BitnetError


def pack_fours(codes: np.ndarray) -> np.ndarray:
    """uint8 codes + 1 (4 k, out) to bytes (k, out), the first of four in the lowest bits."""
    return codes[0::4] | codes[1::4] << 2 | codes[2::4] << 4 | codes[3::4] << 6


def unpack_fours(packed: np.ndarray) -> np.ndarray:
    """Inverse of `pack_fours`."""
    parts = [(packed >> (2 * j)) & 3 for j in range(4)]
    return np.stack(parts, axis=1).reshape(-1, packed.shape[1])


def bytes_of(codes: np.ndarray) -> np.ndarray:
    """Codes int8 (in, out) to our bytes (ceil(in / 4), out), as `bitnet_jax.packed.pack_codes`.

    On the host, where checkpoints are read: nothing is compiled for each shape.

    >>> bytes_of(np.array([[-1], [0], [1], [1], [-1]], np.int8)).tolist()
    [[164], [84]]
    """
    padded = np.pad(codes, ((0, -len(codes) % 4), (0, 0)))
    return pack_fours((padded + 1).astype(np.uint8))


def bytes_from_hf(packed: np.ndarray) -> np.ndarray:
    """Their bytes, four quarters of the outputs each, to ours, four adjacent inputs each.

    theirs[r, c] = sum_i (code[i R + r, c] + 1) << 2 i,  codes (out, in) = (4 R, in)
    ours[k, o]   = sum_j (code[o, 4 k + j] + 1) << 2 j,  codes here (in, out)

    Args:
      packed: uint8 (out / 4, in).

    Returns:
      uint8 (ceil(in / 4), out), as `bitnet_jax.packed.pack_codes` packs; missing inputs are code 0.

    Raises:
      BitnetError: if two bits somewhere are 3, which is no code.

    >>> bytes_from_hf(np.array([[0b10_01_00_10]], np.uint8)).tolist()
    [[86, 84, 85, 86]]
    """
    if (packed & (packed >> 1) & 0x55).any():
        raise BitnetError("holds two bits that are no code; it is damaged or not packed this way")
    rows, size = packed.shape
    out = np.empty((-(-size // 4), 4 * rows), np.uint8)
    for i in range(4):  # a quarter of the codes unpacked at a time
        codes = np.full((4 * len(out), rows), 1, np.uint8)
        codes[:size] = ((packed >> (2 * i)) & 3).T
        out[:, i * rows : (i + 1) * rows] = pack_fours(codes)
    return out


def bytes_to_hf(packed: np.ndarray, in_features: int) -> np.ndarray:
    """Inverse of `bytes_from_hf`; the number of outputs must be a multiple of four.

    >>> bytes_to_hf(np.array([[86, 84, 85, 86]], np.uint8), 1).tolist() == [[0b10_01_00_10]]
    True
    """
    rows = packed.shape[1] // 4
    out = np.zeros((rows, in_features), np.uint8)
    for i in range(4):
        codes = unpack_fours(packed[:, i * rows : (i + 1) * rows])
        out |= codes[:in_features].T << (2 * i)
    return out


def exact_ternary(values: np.ndarray, group: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes and scale out of codes times scale, exactly; None if the values are no such product.

    code = sign(value),  scale = the one abs value there is, for the matrix if it has only one,
    else for each output, else (with ``group``) for each group of inputs of each output

    A mean of abs values would shrink the scale by the share of zeros; nothing is averaged here.
    Where all values that share a scale are 0, the scale is lost with them, and 0.

    Args:
      values: float (in, out).
      group: inputs that may share a scale, 0 for all.

    Returns:
      codes int8 (in, out), scale float32 (1, 1), (1, out) or (groups, out).

    >>> codes, scale = exact_ternary(np.array([[0.5, 0.0], [-0.5, 0.25]], np.float32))
    >>> codes.tolist(), scale.tolist()
    ([[1, 0], [-1, 1]], [[0.5, 0.25]])
    """
    size, out = values.shape
    whole = _one_magnitude(values.reshape(-1, 1))
    if whole is not None:
        return np.sign(values).astype(np.int8), whole
    each = _one_magnitude(values)
    if each is None and group:
        padded = np.pad(values, ((0, -size % group), (0, 0)))
        blocks = padded.reshape(-1, group, out).transpose(1, 0, 2).reshape(group, -1)
        each = _one_magnitude(blocks)
        each = None if each is None else each.reshape(-1, out)
    return None if each is None else (np.sign(values).astype(np.int8), each)


def _one_magnitude(x: np.ndarray) -> np.ndarray | None:
    """The one abs value above 0 of each column, float32 (1, columns); None if there are two."""
    size = np.abs(x.astype(np.float32))
    largest = size.max(0, initial=0, keepdims=True)
    return largest if bool(((size == 0) | (size == largest)).all()) else None
