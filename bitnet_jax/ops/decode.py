"""A few rows from packed codes in plain JAX: the ops of decoding where there is no compiler.

Nothing is unpacked to memory. The codes are multiplied in lanes of int16, which is what every
vector unit has and XLA fuses into one pass over the bytes. Two bit planes with AND and
`lax.population_count`, fast where the CPU counts bits in vectors, take seven times as long where it
does not (benchmarks/products.py has both).
"""

import jax
import jax.numpy as jnp
from jax import lax

# Packed rows whose sums stay in one lane: 16 codes times four, |4 (code + 1) x| <= 8 * 128 each.
_STREAMS = 8
_EXACT = 4096  # inputs whose sums of 16 * 255 each stay below 2 ** 24
_CHUNK = 16  # partial sums added in one turn of the loop


def _computed_once(x: jax.Array) -> jax.Array:
    """x itself. What x is made of, XLA's fusions on CPUs would compute anew for every output.

    They look through `lax.optimization_barrier`; a scatter they do not take in.
    """
    everywhere = jnp.arange(len(x))
    return jnp.zeros_like(x).at[everywhere].set(x, unique_indices=True, indices_are_sorted=True)


def _lanes(x: jax.Array, codes: list[jax.Array]) -> jax.Array:
    """x int16 (s, p, 4), s <= 8 codes, uint8 (p, n) -> int16 (p, n), sums over s and the byte.

    Inputs 1 and 3 of a byte are masked where they lie, four times too large: that saves a shift
    each, and they are divided once, in the end.
    """
    ones, fours = jnp.int16(0), jnp.int16(0)
    for byte, scalars in zip(codes, x):
        low = byte.astype(jnp.int16)
        high = low >> 4
        x0, x1, x2, x3 = (scalars[:, j, None] for j in range(4))
        ones += (low & 3) * x0 + (high & 3) * x2
        fours += (low & 12) * x1 + (high & 12) * x3
    return ones + (fours >> 2)


def _total(parts: jax.Array) -> jax.Array:
    """int16 (p, n) -> int32 (n,). XLA's own reduction over rows takes longer than the product."""
    turns, left = divmod(len(parts), _CHUNK)
    add = lambda rows: sum((row.astype(jnp.int32) for row in rows), jnp.int32(0))

    def turn(i, total):
        return total + add(lax.dynamic_slice_in_dim(parts, i * _CHUNK, _CHUNK))

    total = jnp.zeros(parts.shape[1:], jnp.int32) + add(parts[len(parts) - left :])
    return lax.fori_loop(0, turns, turn, total) if turns else total


def _row(x: jax.Array, codes: jax.Array, layer: jax.Array) -> jax.Array:
    """x int8 (k,), codes uint8 (layers, p, n), layer int32 () -> int32 (n,)."""
    layers, p, n = codes.shape
    total = -x.astype(jnp.int32).sum()  # because codes are stored one too large
    x = jnp.pad(x.astype(jnp.int16), (0, 4 * p - x.size)).reshape(p, 4)
    # Eight streams far apart, each read from its first byte to its last, use memory best. Each is
    # a slice of its own, which XLA reads in place: one of the whole layer would be copied first.
    codes, start = codes.reshape(layers * p, n), jnp.clip(layer, 0, layers - 1) * p
    each, left = divmod(p, _STREAMS)
    for first, streams, length in ((0, _STREAMS, each), (p - left, left, 1)):
        if streams * length:
            rows = range(first, first + streams * length, length)
            cut = [lax.dynamic_slice_in_dim(codes, start + row, length) for row in rows]
            scalars = x[first : first + streams * length].reshape(streams, length, 4)
            total += _total(lax.optimization_barrier(_lanes(scalars, cut)))
    return jnp.broadcast_to(total, (n,))


def packed_product(
    x: jax.Array, codes: jax.Array, in_features: int, index: jax.Array | None = None
) -> jax.Array:
    """int8 activations times packed ternary codes, for a few rows; see `xla.packed_product`.

    out[b, m, n] = sum over k of x[b, m, k] * code[b, k, n]

    Args:
      x: int8 (*batch, rows, k). The cost grows with the rows: for many, unpack.
      codes: uint8 (*batch, ceil(k / 4), n); with an index (*batch, layers, ceil(k / 4), n).
      in_features: k.
      index: int32 (*batch), which layer of codes to multiply by.

    Returns:
      int32 (*batch, rows, n). Batch axes broadcast.

    >>> packed_product(jnp.full((1, 3), 2, jnp.int8), jnp.array([[170]], jnp.uint8), 3).tolist()
    [[6]]
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"x {x.shape} does not have {in_features} features")
    if index is None:
        codes, index = jnp.expand_dims(codes, -3), jnp.zeros((), jnp.int32)
    row = jnp.vectorize(_row, signature="(k),(l,p,n),()->(n)")
    return row(x, jnp.expand_dims(codes, -4), jnp.expand_dims(index, -1))


def int8_table(x: jax.Array, codes: jax.Array, table: bool = True) -> jax.Array:
    """One row times a table of packed 8-bit codes; see `xla.int8_product`.

    XLA's float32 product of one row converts bytes as it reads them, which its integer one does
    not. It is exact as long as no sum leaves 2 ** 24, so x goes in two parts of four bits:

    x = 16 high + low, |high|, |low| < 16:  |sum of part * code| <= 16 * 255 * k

    Args:
      x: int8 (1, k); more rows work, but are better unpacked.
      codes: uint8 (n, k).
      table: True; codes (k, n) are not for this op.

    Returns:
      int32 (1, n).

    >>> int8_table(jnp.full((1, 2), 2, jnp.int8), jnp.array([[129, 131]], jnp.uint8)).tolist()
    [[8]]
    """
    if not table or x.shape[-1] != codes.shape[-1]:
        raise ValueError(f"x {x.shape} and codes {codes.shape} do not fit (table={table})")
    parts = _computed_once(jnp.stack([x >> 4, x & 15]).astype(jnp.float32))
    part = lambda x, codes: jnp.dot(
        x, codes.astype(jnp.float32).T, precision=lax.Precision.HIGHEST
    ).astype(jnp.int32)
    total = -128 * x.astype(jnp.int32).sum(-1, keepdims=True)  # because codes are stored too large
    for i in range(0, x.shape[-1], _EXACT):
        some = slice(i, i + _EXACT)
        for x_part, factor in zip(parts, (16, 1)):
            total += factor * part(x_part[:, some], codes[:, some])
    return jnp.broadcast_to(total, (x.shape[0], codes.shape[0]))
