"""The integer product in plain XLA: runs everywhere, exact everywhere."""

import jax
import jax.numpy as jnp
from jax import lax

from ..packed import unpack_codes


def integer_product(x: jax.Array, codes: jax.Array, batch_dims: int = 0) -> jax.Array:
    """int8 x int8 -> int32, the accumulator every other op must equal bit for bit.

    out[b, ..., n] = sum over k of x[b, ..., k] * codes[b, k, n]

    Args:
      x: int8 (*batch, *rows, k).
      codes: int8 (*batch, k, n).
      batch_dims: number of leading axes the two share.

    Returns:
      int32 (*batch, *rows, n). |sum| <= 128 k, so k up to 16 million cannot overflow.

    >>> integer_product(jnp.full((1, 3), 2, jnp.int8), jnp.ones((3, 1), jnp.int8)).tolist()
    [[6]]
    """
    batch = tuple(range(batch_dims))
    rows = x.shape[batch_dims:-1]
    # XLA:CPU takes its int8 matrix unit from two rows up; one row falls into a naive loop that
    # is several times slower than float32. A row of zeros costs less than that.
    x, codes = _whole(x, codes, batch_dims)
    lone = bool(rows) and all(n == 1 for n in rows)
    if lone:
        axis = x.ndim - 2
        x = jnp.pad(x, [(0, int(i == axis)) for i in range(x.ndim)])
    dims = (((x.ndim - 1,), (batch_dims,)), (batch, batch))
    out = lax.dot_general(x, codes, dims, preferred_element_type=jnp.int32)
    return lax.slice_in_dim(out, 0, 1, axis=out.ndim - 2) if lone else out


def _whole(x: jax.Array, codes: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Zeros after the contracted axes, to a multiple of 32, where that is no multiple of 4.

    XLA on GPUs (jaxlib 0.11.2, an H200) multiplies int8 matrices of 5, 6, 33 or 63 inputs in a
    Triton kernel whose every sum is twice what it should be.
    """
    size = x.shape[-1]
    more = -size % 32 if size % 4 else 0
    if not more:
        return x, codes
    return (
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]),
        jnp.pad(codes, [(0, more if i == axis else 0) for i in range(codes.ndim)]),
    )


def take_layer(codes: jax.Array, index: jax.Array | None) -> jax.Array:
    """codes (*batch, layers, p, n) at index (*batch) -> (*batch, p, n); all of them for None.

    >>> take_layer(jnp.arange(6, dtype=jnp.uint8).reshape(3, 1, 2), jnp.int32(1)).tolist()
    [[2, 3]]
    """
    if index is None:
        return codes
    take = lambda codes, index: lax.dynamic_index_in_dim(codes, index, keepdims=False)
    return jnp.vectorize(take, signature="(l,p,n),()->(p,n)")(codes, index)


def packed_product(
    x: jax.Array, codes: jax.Array, in_features: int, index: jax.Array | None = None
) -> jax.Array:
    """int8 activations times packed ternary codes, by unpacking them: the reference of the ops.

    out[b, m, n] = sum over k of x[b, m, k] * code[b, k, n]

    Args:
      x: int8 (*batch, rows, k).
      codes: uint8 (*batch, ceil(k / 4), n), as `bitnet_jax.packed.pack_codes` makes them; with an
        index (*batch, layers, ceil(k / 4), n).
      in_features: k.
      index: int32 (*batch), which layer of codes to multiply by.

    Returns:
      int32 (*batch, rows, n). Batch axes broadcast.

    >>> packed_product(jnp.full((1, 3), 2, jnp.int8), jnp.array([[170]], jnp.uint8), 3).tolist()
    [[6]]
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"x {x.shape} does not have {in_features} features")
    unpacked = unpack_codes(take_layer(codes, index), in_features)
    return jnp.vectorize(integer_product, signature="(m,k),(k,n)->(m,n)")(x, unpacked)


# Sums of int8 times -1, 0 or 1 that float32 holds exactly.
_EXACT = 2**24 // 128


def packed_product_float8(
    x: jax.Array, codes: jax.Array, in_features: int, index: jax.Array | None = None
) -> jax.Array:
    """`packed_product` for TPUs without int8 units (v7): bfloat16 times float8, sums in float32.

    int8 is exact in bfloat16, -1, 0 and 1 in float8_e4m3fn, and sums of up to 131,072 inputs in
    float32, so the result is the same int32 to the bit; more inputs go the int8 way. Arguments and
    result as there.

    >>> x, codes = jnp.full((1, 3), 2, jnp.int8), jnp.array([[170]], jnp.uint8)
    >>> packed_product_float8(x, codes, 3).tolist()
    [[6]]
    """
    if in_features > _EXACT:
        return packed_product(x, codes, in_features, index)
    if x.shape[-1] != in_features:
        raise ValueError(f"x {x.shape} does not have {in_features} features")
    unpacked = unpack_codes(take_layer(codes, index), in_features).astype(jnp.float8_e4m3fn)

    def one(x, codes):
        dims = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, codes, dims, preferred_element_type=jnp.float32)

    product = jnp.vectorize(one, signature="(m,k),(k,n)->(m,n)")
    return product(x.astype(jnp.bfloat16), unpacked).astype(jnp.int32)
