"""Attention after its projections, in the order of operations that CPUs are fast at."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..ops import attention as native
from ..ops import by_platform


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(e)) v for every head; scores and softmax in float32.

    y = (w v) / sum w,  w = exp(s - max s)

    On CPUs, in float32 and where a compiler is there, `bitnet_jax.ops.attention` does it: XLA
    multiplies a batch of small matrices on one thread. First derivatives are backward ones then, as
    those of `bitnet_jax.dot_general` are.

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
    if native.serves(query, key, value):
        seen = jnp.ones((1, 1, 1, 1), bool) if seen is None else seen
        return _by_cpp(query, key, value, _of_pairs(seen, query, key))
    return _by_xla(query, key, value, seen)


def attend_cache(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array) -> jax.Array:
    """`attend` from a cache, whose keys and values lie as one query's products read them best.

    Args:
      query: (batch, length, heads, e).
      key: (batch, kv_heads, e, keys).
      value: (batch, kv_heads, keys, e).
      seen: bool, broadcast against (batch, heads, length, keys).

    Returns:
      (batch, length, heads, e), in the values' dtype.

    >>> x = jnp.ones((1, 1, 2, 4))
    >>> attend_cache(x, jnp.ones((1, 1, 4, 3)), jnp.ones((1, 1, 3, 4)), jnp.array(True)).shape
    (1, 1, 2, 4)
    """
    if native.serves_cache(query, key, value):
        return _from_cache(query, key, value, _of_pairs(seen, query, key.transpose(0, 3, 1, 2)))
    return attend(query, *_in_order(key, value), seen)


def _in_order(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A cache's keys and values as (batch, keys, kv_heads, e)."""
    return key.transpose(0, 3, 1, 2), value.transpose(0, 2, 1, 3)


def _from_cache_by_xla(query, key, value, seen) -> jax.Array:
    return _by_xla(query, *_in_order(key, value), seen)


@jax.custom_jvp
def _from_cache(*operands) -> jax.Array:
    return _on_cpus(native.cached, _from_cache_by_xla, *operands)


@_from_cache.defjvp
def _from_cache_jvp(operands, tangents):
    seen = operands[3]
    f = lambda q, k, v: _from_cache_by_xla(q, k, v, seen)
    return jax.jvp(f, operands[:3], tangents[:3])


def _by_xla(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array | None
) -> jax.Array:
    """The same in `jax.numpy`.

    Divided after the product with the values: XLA on CPUs fuses a division before it into that
    product and loses its fast path, for seven times the time.
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


def _of_pairs(seen: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """seen with all four axes, each as long as its own or 1."""
    pairs = len(query), query.shape[2], query.shape[1], key.shape[1]
    jax.eval_shape(lambda seen: jnp.broadcast_to(seen, pairs), seen)  # raises if it does not fit
    return seen.reshape((1,) * (4 - seen.ndim) + seen.shape)


def _on_cpus(form: Callable, other: Callable, *operands) -> Any:
    pick = lambda platform: "native" if platform == "cpu" else "xla"
    return by_platform(pick, {"native": form, "xla": other}, *operands)


def _gradients_by_xla(query, key, value, seen, g):
    return jax.vjp(lambda q, k, v: _by_xla(q, k, v, seen), query, key, value)[1](g)


@jax.custom_jvp
def _forward(*operands) -> Any:
    """y, and what `_backward` wants to know; derivatives of second order are XLA's."""

    def other(*operands):  # what log_sum is there no one asks
        y = _by_xla(*operands)
        return y, y.sum(-1).transpose(0, 2, 1)

    return _on_cpus(native.forward, other, *operands)


@_forward.defjvp
def _forward_jvp(operands, tangents):
    seen = operands[3]
    _, dy = jax.jvp(lambda q, k, v: _by_xla(q, k, v, seen), operands[:3], tangents[:3])
    y, log_sum = _forward(*operands)
    return (y, log_sum), (dy, jnp.zeros_like(log_sum))  # `_backward_jvp` has no use for it


@jax.custom_jvp
def _backward(query, key, value, seen, y, log_sum, g) -> Any:
    other = lambda q, k, v, seen, y, log_sum, g: _gradients_by_xla(q, k, v, seen, g)
    return _on_cpus(native.backward, other, query, key, value, seen, y, log_sum, g)


@_backward.defjvp
def _backward_jvp(operands, tangents):
    query, key, value, seen, _, _, g = operands
    f = lambda q, k, v, g: _gradients_by_xla(q, k, v, seen, g)
    _, changes = jax.jvp(f, (query, key, value, g), (*tangents[:3], tangents[-1]))
    return _backward(*operands), changes


@jax.custom_vjp
def _by_cpp(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array) -> jax.Array:
    return _by_cpp_fwd(query, key, value, seen)[0]


# The layers of a network have few shapes: jit traces each of them once.
@jax.jit
def _by_cpp_fwd(*operands):
    y, log_sum = _forward(*operands)
    return y, (*operands, y, log_sum)


@jax.jit
def _by_cpp_bwd(kept, g):
    return (*_backward(*kept, g), None)


_by_cpp.defvjp(_by_cpp_fwd, _by_cpp_bwd)
