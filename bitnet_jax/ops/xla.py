"""The integer product in plain XLA: runs everywhere, exact everywhere."""

import jax
import jax.numpy as jnp
from jax import lax


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
    lone = bool(rows) and all(n == 1 for n in rows)
    if lone:
        axis = x.ndim - 2
        x = jnp.pad(x, [(0, int(i == axis)) for i in range(x.ndim)])
    dims = (((x.ndim - 1,), (batch_dims,)), (batch, batch))
    out = lax.dot_general(x, codes, dims, preferred_element_type=jnp.int32)
    return lax.slice_in_dim(out, 0, 1, axis=out.ndim - 2) if lone else out
