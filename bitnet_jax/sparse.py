"""3:4 sparse ternary codes (one 0 in each four) to bytes and back: 1.25 bits a code."""

import jax
import jax.numpy as jnp

# Eight fours of five bits fill five bytes.
_FOURS, _BITS = 8, 5
_BLOCK = 4 * _FOURS


def pack_fours(codes: jax.Array) -> jax.Array:
    """Codes (..., in, out) int8 to bytes (..., 5 ceil(in / 32), out) uint8.

    Inputs 4j to 4j+3 make a value of five bits: which of them is 0 (two bits), and whether each of
    the three others is -1 (three bits, in order). Bit j of byte b of a block of 32 inputs is bit b
    of its value j. Where inputs are missing, the missing ones count as the 0.

    >>> pack_fours(jnp.array([[1], [0], [-1], [1]], jnp.int8)).ravel().tolist()  # 1 and 0, 1, 0
    [1, 0, 0, 1, 0]
    """
    *lead, size, out = codes.shape
    pad = [(0, 0)] * len(lead) + [(0, -size % _BLOCK), (0, 0)]
    fours = jnp.pad(codes, pad).reshape(*lead, -1, 4, out)
    zero = jnp.argmax(fours == 0, axis=-2, keepdims=True)
    # The three that are left, in order: k or, from the 0 on, k + 1.
    others = jnp.arange(3)[:, None]
    signs = jnp.take_along_axis(fours, others + (others >= zero), axis=-2) < 0
    bits = jnp.concatenate([zero & 1, zero >> 1, signs], axis=-2).astype(jnp.uint8)
    planes = jnp.swapaxes(bits.reshape(*lead, -1, _FOURS, _BITS, out), -3, -2)
    bytes = (planes << jnp.arange(_FOURS, dtype=jnp.uint8)[:, None]).sum(-2, dtype=jnp.uint8)
    return bytes.reshape(*lead, -1, out)


def unpack_fours(packed: jax.Array, in_features: int) -> jax.Array:
    """Inverse of `pack_fours`: bytes to codes (..., in, out) int8.

    >>> unpack_fours(jnp.array([[1], [0], [0], [1], [0]], jnp.uint8), 4).ravel().tolist()
    [1, 0, -1, 1]
    """
    *lead, rows, out = packed.shape
    planes = packed.reshape(*lead, rows // _BITS, _BITS, 1, out)
    bits = (planes >> jnp.arange(_FOURS, dtype=jnp.uint8)[:, None]) & 1
    low, high, *signs = (bits[..., b, :, :] for b in range(_BITS))
    zero = (low + 2 * high)[..., None, :]
    code = 1 - 2 * jnp.stack(signs, axis=-2).astype(jnp.int8)  # (..., blocks, 8, 3, out)
    i = jnp.arange(4)[:, None]
    others = jnp.clip(i - (i > zero), 0, 2)
    codes = jnp.where(i == zero, 0, jnp.take_along_axis(code, others, axis=-2))
    return codes.reshape(*lead, rows // _BITS * _BLOCK, out)[..., :in_features, :].astype(jnp.int8)
