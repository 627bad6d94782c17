"""Embedding tables of codes and scale: rows looked up, and the same table as an output head."""

from typing import Any

import jax
import jax.numpy as jnp

from .leaf import Int8, Packed, PackedInt8, Quantized
from .ops import int8_product
from .packed import pack_codes, unpack_codes, unpack_weight
from .quantize import dequantize, quantize_activations


def take(table: Quantized | Packed, ids: jax.Array, dtype: Any = None) -> jax.Array:
    """Rows of a quantised table: codes[id] * scale[id // group].

    Only the bytes of the rows asked for are read; the table is never unpacked.

    Args:
      table: leaf of shape (rows, features).
      ids: integers (...), negative ones from the end; a row outside reads as NaN, as with
        `jax.numpy.take`.
      dtype: of the result; None for the scale's, float32.

    Returns:
      (..., features).

    >>> from bitnet_jax import Scheme, quantize_weights
    >>> from bitnet_jax.packed import pack_weight
    >>> table = pack_weight(quantize_weights(jnp.array([[1.0, -2], [3, 0]]), Scheme("int8", "row")))
    >>> take(table, jnp.array([1])).tolist()
    [[3.0, 0.0]]
    """
    rows = table.in_features
    ids = jnp.where(ids < 0, ids + rows, ids)
    per_byte = 8 // int(table.bits) if isinstance(table, Packed) else 1
    codes = jnp.take(table.codes, ids // per_byte, axis=0, mode="clip")
    if isinstance(table, Packed):
        # The byte of each row is a matrix of one row of bytes, of which one code is ours.
        codes = unpack_codes(codes[..., None, :], per_byte, int(table.bits))
        codes = jnp.take_along_axis(codes, (ids % per_byte)[..., None, None], axis=-2)[..., 0, :]
    scale = jnp.take(table.scale, ids // (table.group or max(rows, 1)), axis=0, mode="clip")
    inside = ((ids >= 0) & (ids < rows))[..., None]
    values = jnp.where(inside, codes.astype(jnp.float32) * scale, jnp.nan)
    return values.astype(dtype or scale.dtype)


def attend(query: jax.Array, table: Quantized | Packed, dtype: Any = None) -> jax.Array:
    """query @ table.T: a tied output head.

    A table of 8-bit codes with a scale a row is multiplied as any other int8 weight is, by int8
    activations:  (codes_x @ codes.T as int32) * scale * scale_x. Other tables are multiplied in
    float.

    Args:
      query: (..., features), float.
      table: leaf of shape (rows, features).
      dtype: of the product and the result; None for the common dtype of query and scale.

    Returns:
      (..., rows). Differentiable in the query, as if nothing were rounded.
    """
    dtype = dtype or jnp.result_type(query.dtype, table.dtype)
    if in_integers(table):
        rows = query.reshape(-1, query.shape[-1])
        out = jnp.asarray(_integer_logits(rows, table))
        return out.reshape(*query.shape[:-1], -1).astype(dtype)
    return jnp.dot(query.astype(dtype), _values(table).astype(dtype).T)


def in_integers(table: Quantized | Packed) -> bool:
    """Whether `attend` rounds its queries to int8: for 8-bit tables with a scale a row."""
    is_int8 = isinstance(table, Int8 | PackedInt8)
    return is_int8 and table.group == 1 and table.scale.shape[-1] == 1


def _values(table: Quantized | Packed) -> jax.Array:
    return dequantize(unpack_weight(table) if isinstance(table, Packed) else table)


@jax.custom_vjp
def _integer_logits(query: jax.Array, table: Int8 | PackedInt8) -> jax.Array:
    """query (n, features) float, table (rows, features) -> float32 (n, rows)."""
    codes, scale = quantize_activations(query)
    packed = table.codes if isinstance(table, PackedInt8) else pack_codes(table.codes, 8)
    return int8_product(codes, packed, table=True).astype(jnp.float32) * scale * table.scale[:, 0]


def _integer_logits_fwd(query, table):
    return _integer_logits(query, table), (query, table)


def _integer_logits_bwd(residuals, g):
    query, table = residuals
    return (g @ _values(table)).astype(query.dtype), None


_integer_logits.defvjp(_integer_logits_fwd, _integer_logits_bwd)
