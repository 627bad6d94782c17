"""Attention after its projections, in the order of operations that CPUs are fast at."""

import jax
import jax.numpy as jnp


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(e)) v for every head; scores and softmax in float32.

    y = (w v) / sum w,  w = exp(s - max s):  divided after the product with the values. XLA on CPUs
    fuses a division before it into that product and loses its fast path, for seven times the time.

    Args:
      query: (batch, length, heads, e).
      key, value: (batch, keys, kv_heads, e); each of their heads serves heads / kv_heads queries.
      seen: which pairs count, bool, broadcast against (batch, heads, length, keys); None for all.
        A query that sees no key gives 0.

    Returns:
      (batch, length, heads, e), in the values' dtype.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> attend(x, x[:, :, :1], 2 * x[:, :, :1]).shape
    (1, 3, 2, 4)
    """
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    # The queries that share a key head are rows of one matrix: keys are never repeated.
    query = query.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, groups, -1, size)
    wide = jnp.float32
    scores = jnp.matmul(query, key.transpose(0, 2, 3, 1), preferred_element_type=wide)
    scores = scores.reshape(batch, heads, length, -1) * size**-0.5
    if seen is not None:
        scores = jnp.where(seen, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    rows = weights.astype(value.dtype).reshape(batch, groups, -1, scores.shape[-1])
    y = jnp.matmul(rows, value.transpose(0, 2, 1, 3), preferred_element_type=wide)
    total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    y = y.reshape(batch, heads, length, -1) / total
    return y.transpose(0, 2, 1, 3).astype(value.dtype)
