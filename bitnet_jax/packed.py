"""The packed ternary leaf: four adjacent inputs to a byte, 2 bits a code."""

import dataclasses

import jax
import jax.numpy as jnp

from .quantize import Ternary

CODES_PER_BYTE = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTernary:
    """A ternary weight with its codes at 2 bits: the leaf that stands where a kernel stood.

    Invariants: ``codes`` is uint8, shape (..., ceil(in / 4), out); bits 2j and 2j+1 of byte i hold
    code + 1 of input 4 i + j, so inputs past the end read as code 0; ``scale`` and ``group`` are
    as in `Ternary`. Only sizes that survive vmap and scan are static: the packed axis is counted
    from the end, and leading axes are never written down.

    >>> leaf = pack_weight(Ternary(jnp.ones((5, 3), jnp.int8), jnp.ones((1, 1))))
    >>> leaf.shape, leaf.codes.shape, leaf.nbytes
    ((5, 3), (2, 3), 10)
    """

    codes: jax.Array
    scale: jax.Array
    in_features: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape (..., in, out)."""
        return (*self.codes.shape[:-2], self.in_features, self.codes.shape[-1])

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self):
        """Dtype of the values, which is the scale's."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scale in memory."""
        return self.codes.nbytes + self.scale.nbytes


def pack_codes(codes: jax.Array) -> jax.Array:
    """Codes (..., in, out) in {-1, 0, 1} to bytes (..., ceil(in / 4), out) uint8.

    byte[i] = sum over j < 4 of (code[4 i + j] + 1) << 2 j; missing inputs count as code 0.

    >>> pack_codes(jnp.array([[-1], [0], [1], [1], [-1]], jnp.int8)).tolist()
    [[164], [84]]
    """
    *lead, size, out = codes.shape
    rows = -(-size // CODES_PER_BYTE)
    pad = [(0, 0)] * len(lead) + [(0, -size % CODES_PER_BYTE), (0, 0)]
    quads = (jnp.pad(codes, pad) + 1).astype(jnp.uint8).reshape(*lead, rows, CODES_PER_BYTE, out)
    shifts = jnp.arange(0, 2 * CODES_PER_BYTE, 2, dtype=jnp.uint8)[:, None]
    return (quads << shifts).sum(axis=-2, dtype=jnp.uint8)


def unpack_codes(packed: jax.Array, in_features: int) -> jax.Array:
    """Inverse of `pack_codes`: bytes (..., ceil(in / 4), out) to codes (..., in, out) int8.

    >>> unpack_codes(jnp.array([[164], [84]], jnp.uint8), 5)[:, 0].tolist()
    [-1, 0, 1, 1, -1]
    """
    *lead, rows, out = packed.shape
    shifts = jnp.arange(0, 2 * CODES_PER_BYTE, 2, dtype=jnp.uint8)[:, None]
    quads = (packed[..., None, :] >> shifts) & jnp.uint8(3)
    codes = quads.astype(jnp.int8) - jnp.int8(1)
    return codes.reshape(*lead, rows * CODES_PER_BYTE, out)[..., :in_features, :]


def pack_weight(weight: Ternary) -> PackedTernary:
    """`Ternary` to the packed leaf; exact, jit-able, any input width."""
    return PackedTernary(
        pack_codes(weight.codes), weight.scale, weight.codes.shape[-2], weight.group
    )


def unpack_weight(leaf: PackedTernary) -> Ternary:
    """The packed leaf back to `Ternary`; exact, jit-able."""
    return Ternary(unpack_codes(leaf.codes, leaf.in_features), leaf.scale, leaf.group)


def is_ternary(x: object) -> bool:
    """Whether ``x`` is a ternary leaf, packed or not: the ``is_leaf`` of tree functions.

    >>> is_ternary(jnp.ones(3))
    False
    """
    return isinstance(x, Ternary | PackedTernary)
