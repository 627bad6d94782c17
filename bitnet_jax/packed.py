"""Codes to bytes and back: 2 bits a ternary code, 4 or 8 an integer one."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from .leaf import PACKED, Packed, PackedSparse, Quantized
from .sparse import pack_fours, unpack_fours

_KIND = {kind.unpacked: kind for kind in PACKED}
# By itself one program a shape, not one an operation; within another program nothing of its own.
_one_program = functools.partial(jax.jit, inline=True)


def _shifts(bits: int) -> jax.Array:
    return jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]


def pack_codes(codes: jax.Array, bits: int = 2) -> jax.Array:
    """Codes (..., in, out) int8 to bytes (..., ceil(in * bits / 8), out) uint8.

    byte[i] = sum over j < n of (code[n i + j] + offset) << bits j, with n = 8 / bits codes a byte
    and offset 1 for 2 bits, 2 ** (bits - 1) otherwise; missing inputs count as code 0.

    >>> pack_codes(jnp.array([[-1], [0], [1], [1], [-1]], jnp.int8)).tolist()
    [[164], [84]]
    """
    *lead, size, out = codes.shape
    n = 8 // bits
    rows = -(-size // n)
    pad = [(0, 0)] * len(lead) + [(0, -size % n), (0, 0)]
    # Wraps for 8 bits, as it should: -127 + 128 mod 256.
    shifted = lax.bitcast_convert_type(jnp.pad(codes, pad), jnp.uint8) + jnp.uint8(_offset(bits))
    parts = shifted.reshape(*lead, rows, n, out)
    return (parts << _shifts(bits)).sum(axis=-2, dtype=jnp.uint8)


def unpack_codes(packed: jax.Array, in_features: int, bits: int = 2) -> jax.Array:
    """Inverse of `pack_codes`: bytes to codes (..., in, out) int8.

    >>> unpack_codes(jnp.array([[164], [84]], jnp.uint8), 5)[:, 0].tolist()
    [-1, 0, 1, 1, -1]
    """
    *lead, rows, out = packed.shape
    parts = (packed[..., None, :] >> _shifts(bits)) & jnp.uint8(2**bits - 1)
    # No conversion: where the codes go on to float32 and a sum or maximum in one program, XLA's CPU
    # backend (jaxlib 0.10.2) takes -1, 255 as uint8, for 127.
    codes = lax.bitcast_convert_type(parts - jnp.uint8(_offset(bits)), jnp.int8)
    return codes.reshape(*lead, rows * (8 // bits), out)[..., :in_features, :]


def _offset(bits: int) -> int:
    return 1 if bits == 2 else 2 ** (bits - 1)


@_one_program
def pack_weight(weight: Quantized) -> Packed:
    """A quantised weight to the packed leaf; exact, jit-able, any input width.

    >>> from bitnet_jax import Ternary
    >>> leaf = pack_weight(Ternary(jnp.ones((5, 3), jnp.int8), jnp.ones((1, 1))))
    >>> type(leaf).__name__, leaf.shape, leaf.codes.shape, leaf.nbytes
    ('PackedTernary', (5, 3), (2, 3), 10)
    """
    kind = _KIND[type(weight)]
    sparse = kind is PackedSparse
    return kind(
        pack_fours(weight.codes) if sparse else pack_codes(weight.codes, int(kind.bits)),
        weight.scale,
        weight.in_features,
        weight.group,
        weight.in_shape,
        weight.out_shape,
    )


@_one_program
def unpack_weight(leaf: Packed) -> Quantized:
    """The packed leaf back to the quantised weight; exact, jit-able."""
    if isinstance(leaf, PackedSparse):
        codes = unpack_fours(leaf.codes, leaf.in_features)
    else:
        codes = unpack_codes(leaf.codes, leaf.in_features, int(leaf.bits))
    return leaf.unpacked(codes, leaf.scale, leaf.group, leaf.in_shape, leaf.out_shape)
